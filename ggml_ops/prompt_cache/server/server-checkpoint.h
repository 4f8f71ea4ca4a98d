#pragma once

#include "chat.h"
#include "common.h"

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <vector>

// A saved recurrent state: the part of a context's memory from which the last tokens cannot be removed. Copies of a
// prompt share its checkpoints.
struct server_checkpoint : common_prompt_checkpoint {
    bool at_message = false;  // at the start of a message, where other prompts are likely to branch off
};

using server_checkpoint_ptr = std::shared_ptr<const server_checkpoint>;
using server_checkpoints    = std::list<server_checkpoint_ptr>;  // in ascending order of n_tokens

// Where a prompt is cut into batches: at messages of the user, every n_ubatch tokens after them, and a few tokens before
// its end. The places depend on the prompt alone, not on the load, on other prompts or on what has been evaluated
// before, so that equal prompts are always evaluated by equal operations.
class server_prompt_cuts {
  public:
    server_prompt_cuts(const common_chat_msg_spans & spans, int32_t n_tokens, int32_t n_ubatch);

    // the first cut after pos; n_tokens after the last one
    int32_t next(int32_t pos) const;

    // whether pos is the start of a message or the cut before the end
    bool is_message(int32_t pos) const;

    // whether pos is a cut
    bool is_cut(int32_t pos) const;

    // End of the batch that begins at pos. It has at most n_batch tokens. Inside it there are cuts only every n_ubatch
    // tokens after pos. It ends where the next checkpoint is due: at a message, or at least `step` tokens after `last`,
    // the position of the last checkpoint. step = 0: at every cut.
    int32_t batch_end(int32_t pos, int32_t n_batch, int64_t last, int32_t step) const;

  private:
    int32_t              n_tokens;
    int32_t              n_ubatch;
    std::vector<int32_t> messages;  // positions > 0, ascending
};

// One prompt and its checkpoints, for server_checkpoints_fit().
struct server_checkpoints_owner {
    server_checkpoints * checkpoints;
    int64_t              n_tokens;  // of the prompt
    int64_t              age;       // 0: in use, 1: most recently used, 2: the one used before it, ...
};

// Bytes of all checkpoints; one that several prompts share counts once.
size_t server_checkpoints_size(const std::vector<server_checkpoints_owner> & owners);

// Remove the checkpoints that are worth least until at most `limit` bytes are left. The worth of a checkpoint is the
// number of tokens that would have to be evaluated again without it, divided by its distance from the end of its prompt
// and by the age of the prompt; at messages it is four times as much. Checkpoints of a long prompt therefore become
// rarer with their distance from its end. Returns the number of removed ones.
size_t server_checkpoints_fit(const std::vector<server_checkpoints_owner> & owners, size_t limit);

// Add the checkpoints of `from` up to n_tokens that `to` does not have.
void server_checkpoints_merge(server_checkpoints & to, const server_checkpoints & from, int64_t n_tokens);
