#pragma once

#include "../server-task.h"
#include "server-slot-identity.h"

#include "llama.h"

#include <cstddef>
#include <string>
#include <vector>

struct common_speculative;

// A slot in a file: the data that llama_state_seq_save_file() writes, followed by the data that only the server has:
//
//     u32 magic, u32 version, u32 n, n x u32 tokens, state of the target context    (as upstream)
//     sections, each: u32 tag, u32 0, u64 size, content
//         'iden'  identity and LoRA adapters: alternating lines, a name and its value
//         'drft'  state of the draft context
//         'spec'  state of the draft's hidden rows, of common_speculative_get_state(): of the checkpoint before it, or of
//                 the whole prompt if it stands before all checkpoints
//         'ckpt'  checkpoint: i64 n_tokens, i32 pos_min, i32 pos_max, u32 at_message, u32 0, u64 size of the target's
//                 part, u64 size of the draft's part, both parts
//     u64 bytes before the sections, u64 x 2 XXH3 of all bytes before the hash, u64 magic
//
// Little-endian. Upstream reads such a file, without the sections. A file without sections, or without some of them, is
// restored too: the first drafts then do without the hidden rows. A section of an unknown kind is refused.

// where a file is restored
struct server_slot_target {
    llama_context *                  ctx_tgt;
    llama_context *                  ctx_dft;  // or null
    common_speculative *             spec;     // or null
    llama_seq_id                     id;
    int32_t                          n_ctx;  // most tokens of the sequence
    bool                             has_mtmd;
    const server_slot_identity &     identity;
    const std::vector<std::string> & adapter_ids;  // LoRA adapters that are loaded
    std::string                      adapters;     // with which upstream's files were evaluated
};

// Write a file under a temporary name, and rename it when it is complete. Returns its size. Throws std::runtime_error.
size_t server_slot_save(const std::string &          path,
                        const server_prompt &        prompt,
                        llama_context *              ctx_tgt,
                        llama_context *              ctx_dft,
                        common_speculative *         spec,
                        llama_seq_id                 id,
                        const server_slot_identity & identity);

// The same for a saved prompt.
size_t server_slot_save(const std::string &               path,
                        const server_prompt_cache_state & state,
                        const server_slot_identity &      identity);

// Restore a file. Returns its prompt. Throws std::runtime_error with the reason if the file is damaged or of another
// model. The sequence then has its previous state, or is empty if that cannot be restored.
server_prompt server_slot_restore(const std::string & path, const server_slot_target & target, size_t & n_bytes);
