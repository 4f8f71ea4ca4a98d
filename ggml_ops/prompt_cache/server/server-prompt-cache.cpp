#include "../server-common.h"
#include "../server-task.h"
#include "llama.h"
#include "server-prompts.h"
#include "speculative.h"

#include <functional>
#include <list>
#include <set>

#ifdef __GLIBC__
#include <malloc.h>
#endif

void server_return_memory() {
#ifdef __GLIBC__
    // by default malloc() keeps up to 32 MiB of each state, in pieces that later states do not fit into
    mallopt(M_MMAP_THRESHOLD, 128 * 1024);
#endif
}

json server_checkpoints_json(const server_checkpoints & checkpoints) {
    json res = json::array();
    for (const auto & ckpt : checkpoints) {
        res.push_back({ { "n_tokens", ckpt->n_tokens }, { "size", ckpt->size() } });
    }
    return res;
}

//
// server_prompt_data
//

bool server_prompt_data::read(llama_context *      ctx_tgt,
                              llama_context *      ctx_dft,
                              common_speculative * speculative,
                              int32_t              id_slot) {
    const auto read_state = [&](llama_context * ctx, std::vector<uint8_t> & data) {
        return !ctx || llama_state_seq_get_data_ext(ctx, data.data(), data.size(), id_slot,
                                                    LLAMA_STATE_SEQ_FLAGS_NONE) == data.size();
    };
    if (!read_state(ctx_tgt, main) || !read_state(ctx_dft, drft)) {
        return false;
    }
    common_speculative_get_state(speculative, id_slot, spec);
    return true;
}

//
// server_prompt
//
size_t server_prompt::n_reuse(const server_tokens & tokens_new, bool can_cut) const {
    const size_t n_common = tokens.get_common_prefix(tokens_new);
    if (n_common == 0 || tokens_new.empty()) {
        return 0;
    }

    // at least one token has to be evaluated
    const size_t n_most = std::min(n_common, tokens_new.size() - 1);

    if (can_cut || n_most == tokens.size()) {
        return n_most;
    }

    for (auto it = checkpoints.rbegin(); it != checkpoints.rend(); ++it) {
        if ((size_t) (*it)->n_tokens <= n_most) {
            return (*it)->n_tokens;
        }
    }

    return 0;
}

//
// server_prompt_cache
//
size_t server_prompt_cache::size(const server_checkpoints & more) const {
    size_t res = 0;

    // prompts with the same beginning share checkpoints
    std::set<const server_checkpoint *> counted;

    for (const auto & ckpt : more) {
        if (counted.insert(ckpt.get()).second) {
            res += ckpt->size();
        }
    }

    for (const auto & state : states) {
        res += state.data.size();

        for (const auto & ckpt : state.prompt.checkpoints) {
            if (counted.insert(ckpt.get()).second) {
                res += ckpt->size();
            }
        }
    }

    return res;
}

size_t server_prompt_cache::n_tokens() const {
    size_t res = 0;

    for (const auto & state : states) {
        res += state.prompt.n_tokens();
    }

    return res;
}

server_prompt_cache_state *
server_prompt_cache::alloc(const server_prompt & prompt, size_t state_size_tgt, size_t state_size_dft) {
    // first check if the current state is contained fully in the cache
    for (auto it = states.begin(); it != states.end(); ++it) {
        const int cur_lcp_len = it->prompt.tokens.get_common_prefix(prompt.tokens);

        if (cur_lcp_len == (int) prompt.tokens.size() && it->prompt.adapters == prompt.adapters) {
            SRV_TRC("%s", " - prompt is already in the cache, skipping\n");

            server_checkpoints_merge(it->prompt.checkpoints, prompt.checkpoints, cur_lcp_len);

            return nullptr;
        }
    }

    const size_t state_size_new = state_size_tgt + state_size_dft;

    // skip over-limit entries to avoid disturbing the cache
    if (limit_size > 0 && state_size_new > limit_size) {
        SRV_WRN(" - prompt state size %.3f MiB exceeds cache size limit %.3f MiB, skipping\n",
                state_size_new / (1024.0 * 1024.0), limit_size / (1024.0 * 1024.0));
        return nullptr;
    }

    // remove any cached prompts that are fully contained in the current prompt
    server_checkpoints checkpoints = prompt.checkpoints;

    for (auto it = states.begin(); it != states.end();) {
        const int len = it->prompt.tokens.get_common_prefix(prompt.tokens);

        if (len == (int) it->prompt.tokens.size() && it->prompt.adapters == prompt.adapters) {
            SRV_TRC(" - removing obsolete cached prompt with length %d\n", len);

            server_checkpoints_merge(checkpoints, it->prompt.checkpoints, len);

            it = states.erase(it);
        } else {
            ++it;
        }
    }

    if (limit_size > 0) {
        server_checkpoints_fit({ { &checkpoints, prompt.n_tokens(), 0 } }, limit_size - state_size_new);

        // make room before allocating the new vectors to avoid breaching the limit
        while (!states.empty() && size(checkpoints) + state_size_new > limit_size) {
            SRV_WRN(" - making room for prompt cache entry, removing oldest entry (size = %.3f MiB)\n",
                    states.front().size() / (1024.0 * 1024.0));

            states.pop_front();
        }
    }

    std::vector<uint8_t> state_data_tgt;
    std::vector<uint8_t> state_data_dft;

    // check if we can allocate enough memory for the new state
    try {
        state_data_tgt.resize(state_size_tgt);
        state_data_dft.resize(state_size_dft);
    } catch (const std::bad_alloc & e) {
        SRV_ERR("failed to allocate memory for prompt cache state: %s\n", e.what());

        limit_size = std::max<size_t>(1, 0.4 * size());

        SRV_WRN(" - cache size limit reduced to %.3f MiB\n", limit_size / (1024.0 * 1024.0));

        update();

        return nullptr;
    }

    states.push_back({
        /*.prompt =*/{
            /*.tokens      =*/prompt.tokens.clone(),
            /*.checkpoints =*/std::move(checkpoints),
            /*.adapters    =*/prompt.adapters,
        },
        /*.data   =*/
        {
            /*.main =*/std::move(state_data_tgt),
            /*.drft =*/std::move(state_data_dft),
            /*.spec =*/{},
        },
    });

    return &states.back();
}

std::list<server_prompt_cache_state>::iterator
server_prompt_cache::find(const std::function<size_t(const server_prompt &)> & n_reuse, size_t n_min) {
    SRV_TRC(" - looking for a prompt with more than %zu tokens to reuse\n", n_min);

    auto it_best = states.end();

    for (auto it = states.begin(); it != states.end(); ++it) {
        const size_t n_cur = n_reuse(it->prompt);

        SRV_TRC("   - prompt with length %7zu, reusable = %7zu\n", it->prompt.tokens.size(), n_cur);

        if (n_cur > n_min) {
            n_min   = n_cur;
            it_best = it;
        }
    }

    return it_best;
}

bool server_prompt_cache::load(std::list<server_prompt_cache_state> && taken,
                               server_prompt &                         prompt,
                               const server_tokens &                   tokens_new,
                               llama_context *                         ctx_tgt,
                               llama_context *                         ctx_dft,
                               common_speculative *                    spec,
                               int32_t                                 id_slot) {
    const auto restore = [&](llama_context * ctx, const std::vector<uint8_t> & data) {
        const size_t n =
            ctx && !data.empty() ? llama_state_seq_set_data_ext(ctx, data.data(), data.size(), id_slot, 0) : 0;
        if (n == 0 || n != data.size()) {
            SRV_ERR("failed to restore state with size %zu\n", data.size());

            return false;
        }

        return true;
    };

    auto & state = taken.front();

    if (!restore(ctx_tgt, state.data.main) || (ctx_dft && !restore(ctx_dft, state.data.drft))) {
        states.splice(states.end(), taken);
        return false;
    }

    common_speculative_set_state(spec, id_slot, state.data.spec);

    if (state.prompt.tokens.get_common_prefix(tokens_new) == state.prompt.tokens.size()) {
        prompt = std::move(state.prompt);
    } else {
        // keep the entry: another prompt may continue its other tokens
        prompt = state.prompt.clone();

        states.splice(states.end(), taken);
    }

    return true;
}

void server_prompt_cache::update() {
    if (limit_size > 0) {
        while (!states.empty() && size() > limit_size) {
            SRV_WRN(" - cache size limit reached, removing oldest entry (size = %.3f MiB)\n",
                    states.front().size() / (1024.0 * 1024.0));

            states.pop_front();
        }
    }

    // average size per token
    const float size_per_token = std::max<float>(1.0f, float(size()) / (std::max<size_t>(1, n_tokens())));

    // dynamically increase the token limit if it can fit in the memory limit
    const size_t limit_tokens_cur =
        limit_size > 0 ? std::max<size_t>(limit_tokens, limit_size / size_per_token) : limit_tokens;

    if (limit_tokens > 0) {
        while (!states.empty() && n_tokens() > limit_tokens_cur) {
            SRV_WRN(" - cache token limit (%zu, est: %zu) reached, removing oldest entry (size = %.3f MiB)\n",
                    limit_tokens, limit_tokens_cur, states.front().size() / (1024.0 * 1024.0));

            states.pop_front();
        }
    }

    SRV_TRC(" - cache state: %zu prompts, %.3f MiB (limits: %.3f MiB, %zu tokens, %zu est)\n", states.size(),
            size() / (1024.0 * 1024.0), limit_size / (1024.0 * 1024.0), limit_tokens, limit_tokens_cur);

    for (const auto & state : states) {
        SRV_TRC("   - prompt %p: %7d tokens, checkpoints: %2zu, %9.3f MiB\n", (const void *) &state,
                state.prompt.n_tokens(), state.prompt.checkpoints.size(), state.size() / (1024.0 * 1024.0));
    }
}
