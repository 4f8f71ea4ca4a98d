#pragma once

#include <map>
#include <string>

// what has to be equal for a state to be restored: the name of a property -> its value; if only the "draft model" differs,
// the draft model's state and the checkpoints are not restored
using server_slot_identity = std::map<std::string, std::string>;

// a file's content: its size and samples of its bytes; all files of a split model
std::string server_file_identity(const std::string & path);

// a hash of all names and values
std::string server_identity_hash(const server_slot_identity & identity);

// lines, alternating: a name, its value
std::string server_identity_text(const server_slot_identity & identity);
