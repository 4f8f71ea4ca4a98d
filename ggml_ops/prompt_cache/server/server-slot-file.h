#pragma once

#include "../server-task.h"

#include "llama.h"

#include <cstddef>
#include <map>
#include <string>

// A slot in a file: the data that llama_state_seq_save_file() writes, followed by the data that only the server has:
//
//     u32 magic, u32 version, u32 n, n x u32 tokens, state of the target context    (as upstream)
//     sections, each: u32 tag, u32 0, u64 size, content
//         'iden'  identity: alternating lines, a name and its value
//         'drft'  state of the draft context
//         'ckpt'  checkpoint: i64 n_tokens, i32 pos_min, i32 pos_max, u32 at_message, u32 0, u64 size of the target's
//                 part, u64 size of the draft's part, both parts
//     u64 bytes before the sections, u64 x 2 XXH3 of all bytes before the hash, u64 magic
//
// Little-endian. Upstream reads such a file, without the sections. A file without sections is restored too.

// what has to be equal for a state to be restored: the name of a property -> its value; if only the "draft model" differs,
// the draft model's state and the checkpoints are not restored
using server_slot_identity = std::map<std::string, std::string>;

// the model file's content: its size and samples of its bytes; all files of a split model
std::string server_model_identity(const std::string & path);

// Write a file under a temporary name, and rename it when it is complete. Returns its size. Throws std::runtime_error.
size_t server_slot_save(const std::string &          path,
                        const server_prompt &        prompt,
                        llama_context *              ctx_tgt,
                        llama_context *              ctx_dft,
                        llama_seq_id                 id,
                        const server_slot_identity & identity);

// The same for a saved prompt.
size_t server_slot_save(const std::string &               path,
                        const server_prompt_cache_state & state,
                        const server_slot_identity &      identity);

// Restore a file into sequence id, which has at most n_ctx tokens. Returns its prompt. Throws std::runtime_error with
// the reason if the file is damaged or of another model. The sequence then has its previous state, or is empty if that
// cannot be restored.
server_prompt server_slot_restore(const std::string &          path,
                                  bool                         has_mtmd,
                                  int32_t                      n_ctx,
                                  llama_context *              ctx_tgt,
                                  llama_context *              ctx_dft,
                                  llama_seq_id                 id,
                                  const server_slot_identity & identity,
                                  size_t &                     n_bytes);
