// The prompts of the slots and of the cache: which one a request continues, checkpoints, files.
// Members of server_context_impl: server-context.cpp includes this file in its body.

server_slot_identity     identity;     // what has to be equal for the file of a slot to be restored
std::string              kept_prefix;  // of the names of --keep-slots' files: from the identity
std::vector<std::string> adapter_ids;  // of params_base.lora_adapters: file name and content

static constexpr const char * ALORA = "aLoRA";  // see adapters_of()

// --keep-slots
std::unique_ptr<server_file_lock> kept_lock;
std::set<std::string>             kept;  // the files that this server restored or wrote

size_t i_slot_first = 0;  // its prompt is added first to the next batch

server_slot * get_available_slot(const server_task & task) {
    server_slot * ret = nullptr;

    // a slot is saved before it is overwritten if more than this number of its tokens would be lost
    constexpr size_t n_lost_max = 64;

    const std::string adapters = adapters_of(loras_of(task));

    // tokens of a prompt that are not evaluated again if it is continued
    const auto n_reuse = [&](const server_prompt & prompt) -> size_t {
        return task.params.cache_prompt && is_valid_for(prompt, adapters) ? prompt.n_reuse(task.tokens, can_cut()) : 0;
    };

    size_t n_reuse_best = 0;

    // if a specific slot is requested, use it (still goes through cache update logic below)
    if (task.id_slot != -1) {
        ret = get_slot_by_id(task.id_slot);
        if (ret) {
            SLT_INF(*ret, "selected slot by id (%d)\n", task.id_slot);

            if (ret->is_processing()) {
                return ret;
            }

            n_reuse_best = n_reuse(ret->prompt);
        }
    }

    // find the slot of which the most tokens can be reused, among those that have at least n% prompt similarity
    if (!ret && slot_prompt_similarity != 0.0f) {
        size_t n_lost_best = 0;

        for (server_slot & slot : slots) {
            // skip the slot if it is not available
            if (slot.is_processing()) {
                SLT_TRC(slot, " - skipping, is_processing = %d\n", slot.is_processing());
                continue;
            }

            const auto & tokens = slot.prompt.tokens;

            // skip the slot if it does not contains cached tokens
            if (tokens.empty()) {
                SLT_TRC(slot, "%s", " - skipping, slot is empty\n");
                continue;
            }

            // fraction of the Longest Common Prefix length with respect to the input prompt length
            const size_t lcp_len   = tokens.get_common_prefix(task.tokens);
            const float  f_sim_cur = float(lcp_len) / task.tokens.size();

            const size_t n_reuse_cur = n_reuse(slot.prompt);
            const size_t n_lost_cur  = tokens.size() - lcp_len;

            SLT_TRC(slot, " - checking sim = %.3f (%zu/%zu) > %.3f, reusable = %zu\n", f_sim_cur, lcp_len,
                    task.tokens.size(), slot_prompt_similarity, n_reuse_cur);

            // select the current slot if the criteria match
            if (f_sim_cur > slot_prompt_similarity && n_reuse_cur > 0 &&
                (n_reuse_cur > n_reuse_best || (n_reuse_cur == n_reuse_best && n_lost_cur < n_lost_best))) {
                n_reuse_best = n_reuse_cur;
                n_lost_best  = n_lost_cur;

                ret = &slot;
            }
        }

        if (ret != nullptr) {
            SLT_INF(*ret, "selected slot by LCP similarity, reusable = %zu of %zu tokens, not needed = %zu\n",
                    n_reuse_best, task.tokens.size(), n_lost_best);
        }
    }

    // check whether more tokens of a saved prompt can be reused
    const bool use_cache = prompt_cache && task.type == SERVER_TASK_TYPE_COMPLETION;

    auto saved   = decltype(prompt_cache->states.end()){};
    bool do_load = false;

    if (use_cache && task.params.cache_prompt) {
        saved   = prompt_cache->find(n_reuse, n_reuse_best);
        do_load = saved != prompt_cache->states.end();
    }

    if (do_load && task.id_slot == -1) {
        ret = nullptr;
    }

    // find an empty slot, or the one that has been least recently used
    if (ret == nullptr) {
        int64_t t_last = -1;

        for (server_slot & slot : slots) {
            // skip the slot if it is not available
            if (slot.is_processing()) {
                continue;
            }

            // select the current slot if the criteria match
            const int64_t t_cur = slot.prompt.tokens.empty() ? -2 : slot.t_last_used;
            if (!ret || t_cur < t_last) {
                t_last = t_cur;
                ret    = &slot;
            }
        }

        if (ret != nullptr) {
            SLT_INF(*ret, "selected slot by LRU, t_last = %" PRId64 "\n", t_last);
        }
    }

    if (ret && use_cache) {
        const int64_t t_start = ggml_time_us();

        const bool   do_keep = !do_load && task.params.cache_prompt && is_valid_for(ret->prompt, adapters);
        const size_t n_keep  = do_keep ? ret->prompt.tokens.get_common_prefix(task.tokens) : 0;

        // take this entry out first, because saving another can remove entries
        std::list<server_prompt_cache_state> taken;
        if (do_load) {
            taken.splice(taken.end(), prompt_cache->states, saved);
        }

        if (ret->prompt.tokens.size() - n_keep > n_lost_max) {
            ret->prompt_save(*prompt_cache);
        }

        if (do_load && !ret->prompt_load(*prompt_cache, std::move(taken), task.tokens)) {
            ret->prompt_clear();
        }

        prompt_cache->update();

        fit_checkpoints();

        SRV_TRC("prompt cache update took %.2f ms\n", (ggml_time_us() - t_start) / 1000.0);
    }

    return ret;
}

// save the prompts in the cache, before the slots are overwritten
void save_prompts(const std::vector<server_slot *> & lost) {
    if (!prompt_cache) {
        return;
    }
    for (auto * slot : lost) {
        slot->prompt_save(*prompt_cache);
    }
    prompt_cache->update();
}

std::vector<common_adapter_lora_info> loras_of(const server_task & task) const {
    return task.params.lora.empty() ? params_base.lora_adapters : construct_lora_list(task.params.lora);
}

// the LoRA adapters on which a prompt's state depends. aLoRA adapters have one name in common: they are used for
// the last tokens of a prompt only, and n_past is limited to those before them.
std::string adapters_of(const std::vector<common_adapter_lora_info> & loras) const {
    if (lora_all_alora(loras)) {
        return ALORA;
    }

    std::string res;
    for (size_t i = 0; i < loras.size(); i++) {
        if (loras[i].scale != 0.0f) {
            res += (res.empty() ? "" : " ") + adapter_ids[i] + string_format("*%.9g", loras[i].scale);
        }
    }

    return res;
}

// whether the state of a prompt can be continued with these LoRA adapters
static bool is_valid_for(const server_prompt & prompt, const std::string & adapters) {
    return prompt.adapters == adapters || (adapters == ALORA && prompt.adapters.empty());
}

// select the adapters of the task, and clear the slot's prompt if it was evaluated with others
void use_adapters(server_slot & slot, const server_task & task) {
    slot.lora = loras_of(task);

    std::string adapters = adapters_of(slot.lora);
    if (!is_valid_for(slot.prompt, adapters)) {
        SLT_TRC(slot, "clearing the prompt: it was evaluated with other LoRA adapters (%s)\n",
                slot.prompt.adapters.c_str());
        slot.prompt.clear();
    }
    slot.prompt.adapters = std::move(adapters);
}

// the slots in the order in which they fill a batch: a prompt that had to wait for it comes first
std::vector<server_slot *> slots_in_order() {
    std::vector<server_slot *> res;
    for (size_t i = 0; i < slots.size(); i++) {
        res.push_back(&slots[(i_slot_first + i) % slots.size()]);
    }
    return res;
}

static int64_t last_checkpoint(const server_slot & slot) {
    return slot.prompt.checkpoints.empty() ? 0 : slot.prompt.checkpoints.back()->n_tokens;
}

// whether the prompt can be cut, and its cuts depend on its tokens only
static bool is_cut_by_tokens(const server_slot & slot) {
    return slot.can_split() && slot.task->type == SERVER_TASK_TYPE_COMPLETION;
}

// where the slot's part of the batch ends in its prompt
int32_t
batch_end(const server_slot & slot, const server_prompt_cuts & cuts, int32_t n_batch, bool do_checkpoint) const {
    const int32_t n_start = slot.prompt.n_tokens();
    if (is_cut_by_tokens(slot)) {
        const int32_t step = do_checkpoint ? params_base.checkpoint_min_step : INT32_MAX;
        return cuts.batch_end(n_start, n_batch, last_checkpoint(slot), step);
    }
    return std::min(slot.task->n_tokens(), n_start + n_batch - batch.size());
}

// Whether the prompt waits for the next batch, so that it is not cut by the prompts of other slots; n_prompt_tokens
// of them are in the batch. The first one that waits begins the next batch.
bool waits(const server_slot & slot, int32_t n_prompt_tokens, int32_t n_end, int32_t n_batch, bool & is_waiting) {
    if (!is_cut_by_tokens(slot) || n_prompt_tokens == 0 || batch.size() + n_end - slot.prompt.n_tokens() <= n_batch) {
        return false;
    }
    if (!is_waiting) {
        is_waiting   = true;
        i_slot_first = slot.id;
    }
    return true;
}

// only where the prompt is cut: at messages, and elsewhere at least min step after the last one
bool checkpoint_is_due(const server_slot & slot, const server_prompt_cuts & cuts, int32_t pos) const {
    const int64_t last = last_checkpoint(slot);
    return cuts.is_cut(pos) && pos > last && (cuts.is_message(pos) || pos - last >= params_base.checkpoint_min_step);
}

// the prompts that have checkpoints
std::vector<server_checkpoints_owner> checkpoints_owners() {
    std::vector<server_checkpoints_owner> res;

    for (auto & slot : slots) {
        int64_t age = 0;
        for (const auto & other : slots) {
            age += !slot.is_processing() && (other.is_processing() || other.t_last_used > slot.t_last_used);
        }
        res.push_back({ &slot.prompt.checkpoints, slot.prompt.n_tokens(), age });
    }

    if (prompt_cache) {
        int64_t age = slots.size() + prompt_cache->states.size();
        for (auto & state : prompt_cache->states) {
            res.push_back({ &state.prompt.checkpoints, state.prompt.n_tokens(), age-- });
        }
    }

    return res;
}

// remove checkpoints until all of them fit in the budget
void fit_checkpoints() {
    const size_t limit = 1024ull * 1024ull * params_base.ctx_checkpoints_mib;

    for (auto & slot : slots) {
        auto & checkpoints = slot.prompt.checkpoints;
        while (checkpoints.size() > (size_t) params_base.n_ctx_checkpoints) {
            const std::vector<server_checkpoints_owner> owner = { { &checkpoints, slot.prompt.n_tokens(), 0 } };
            GGML_ASSERT(server_checkpoints_size(owner) > 0);
            server_checkpoints_fit(owner, server_checkpoints_size(owner) - 1);
        }
    }

    const auto   owners    = checkpoints_owners();
    const size_t n_removed = server_checkpoints_fit(owners, limit);

    if (n_removed > 0) {
        SRV_TRC("removed %zu context checkpoints, %.3f of %d MiB are left\n", n_removed,
                server_checkpoints_size(owners) / (1024.0 * 1024.0), params_base.ctx_checkpoints_mib);
    }
}

// n_tokens: the number of tokens of the slot's prompt that have been evaluated
void create_checkpoint(
    server_slot & slot, const int64_t n_tokens, bool at_message, llama_pos pos_min, llama_pos pos_max) {
    auto cur = std::make_shared<server_checkpoint>();

    cur->id_task    = slot.task->id;
    cur->at_message = at_message;

    // [TAG_CHECKPOINTS_FIX_POS_MIN]
    // TODO: here we incorrectly deterimne that the saved checkpoint data covers the [pos_min, pos_max] range
    //       this is not true for SWA models: https://github.com/ggml-org/llama.cpp/pull/24411#issuecomment-4677983225
    cur->update_pos(n_tokens, pos_min, pos_max);

    if (ckpt_has_tgt()) {
        cur->update_tgt(ctx_tgt, slot.id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    }
    cur->update_dft(ctx_dft, slot.id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);

    // the state was lost in a failed batch
    if ((ckpt_has_tgt() && cur->data_tgt.empty()) || (ctx_dft && cur->data_dft.empty())) {
        return;
    }

    // stash the draft's speculative state with the checkpoint
    common_speculative_get_state(spec.get(), slot.id, cur->data_spec);

    slot.prompt.checkpoints.push_back(cur);

    SLT_TRC(slot,
            "created context checkpoint %d (pos_min = %d, pos_max = %d, n_tokens = %" PRId64 ", size = %.3f MiB)\n",
            (int) slot.prompt.checkpoints.size(), cur->pos_min, cur->pos_max, cur->n_tokens,
            (float) cur->size() / 1024 / 1024);

    fit_checkpoints();
}

// Read what has to be equal for the file of a slot to be restored: now, because the files of the models can be
// replaced later. Throws std::runtime_error.
void read_identity() {
    identity = {
        { "model", server_file_identity(params_base.model.path) },
        { "K cache type", ggml_type_name(params_base.cache_type_k) },
        { "V cache type", ggml_type_name(params_base.cache_type_v) },
        { "draft model", ctx_dft ? "part of the model" : "none" },
        { "control vectors", "none" },
    };

    const auto & path_dft = params_base.speculative.draft.mparams.path;
    if (ctx_dft && !path_dft.empty()) {
        identity["draft model"] = server_file_identity(path_dft);
    }

    if (!params_base.control_vectors.empty()) {
        std::string & text = identity["control vectors"];
        text               = string_format("layers %d to %d", params_base.control_vector_layer_start,
                                           params_base.control_vector_layer_end);
        for (const auto & vector : params_base.control_vectors) {
            text += " " + server_file_identity(vector.fname) + string_format("*%g", vector.strength);
        }
    }

    identity["RoPE options"] =
        string_format("%d %g %g %g %g %g %g %d", params_base.rope_scaling_type, params_base.rope_freq_base,
                      params_base.rope_freq_scale, params_base.yarn_ext_factor, params_base.yarn_attn_factor,
                      params_base.yarn_beta_fast, params_base.yarn_beta_slow, params_base.yarn_orig_ctx);

    std::string & overrides = identity["overridden keys"];
    for (const auto & entry : params_base.kv_overrides) {
        overrides += std::string(entry.key) + "=";
        switch (entry.tag) {
        case LLAMA_KV_OVERRIDE_TYPE_INT:
            overrides += std::to_string(entry.val_i64);
            break;
        case LLAMA_KV_OVERRIDE_TYPE_FLOAT:
            overrides += string_format("%.17g", entry.val_f64);
            break;
        case LLAMA_KV_OVERRIDE_TYPE_BOOL:
            overrides += entry.val_bool ? "true" : "false";
            break;
        case LLAMA_KV_OVERRIDE_TYPE_STR:
            overrides += entry.val_str;
            break;
        }
        overrides += " ";
    }

    kept_prefix = "kept-" + server_identity_hash(identity).substr(0, 8) + "-";
}

void read_adapter_ids() {
    adapter_ids.clear();
    for (const auto & lora : params_base.lora_adapters) {
        std::string name = std::filesystem::path(lora.path).filename().string();
        std::replace(name.begin(), name.end(), ' ', '_');
        adapter_ids.push_back(name + ":" + server_file_identity(lora.path));
    }
}

server_prompt restore_file(const std::string & path, const server_slot & slot, size_t & n_bytes) const {
    const server_slot_target target = {
        ctx_tgt,  ctx_dft,     spec.get(),
        slot.id,  slot.n_ctx,  mctx != nullptr,
        identity, adapter_ids, adapters_of(params_base.lora_adapters),
    };

    return server_slot_restore(path, target, n_bytes);
}

// The files of --keep-slots for this model and these options, oldest prompt first. Servers of other models can use
// the same folder.
std::string kept_file(int number) const {
    return params_base.slot_save_path + kept_prefix + string_format("%04d.bin", number);
}

std::vector<std::string> kept_files() const {
    std::vector<std::string> res;

    std::error_code ec;
    for (const auto & file : std::filesystem::directory_iterator(params_base.slot_save_path, ec)) {
        const std::string name = file.path().filename().string();
        if (string_starts_with(name, kept_prefix) && string_ends_with(name, ".bin")) {
            res.push_back(params_base.slot_save_path + name);
        }
    }

    std::sort(res.begin(), res.end());

    return res;
}

// Restore the prompt of a slot from a file; return the file's size. Throws std::exception: the slot has then its
// previous contents, or none if they could not be restored.
size_t restore_slot(const std::string & path, server_slot & slot) {
    size_t n_bytes = 0;
    try {
        slot.prompt = restore_file(path, slot, n_bytes);
    } catch (const std::exception &) {
        if (llama_memory_seq_pos_max(llama_get_memory(ctx_tgt), slot.id) != slot.prompt.tokens.pos_next() - 1) {
            slot.prompt_clear();
        }
        throw;
    }
    slot.t_last_used = ggml_time_us();
    fit_checkpoints();
    return n_bytes;
}

// --keep-slots: restore the prompts of the last server
void restore_kept() {
    if (!params_base.keep_slots) {
        return;
    }

    auto & slot = slots.front();

    for (const auto & path : kept_files()) {
        if (!queue_tasks.is_running()) {
            break;  // SIGTERM
        }
        try {
            size_t n_bytes = 0;
            slot.prompt    = restore_file(path, slot, n_bytes);
            slot.prompt_save(*prompt_cache);
            prompt_cache->update();
            fit_checkpoints();
            kept.insert(path);

            SRV_INF("restored a prompt of %d tokens from %s\n", slot.prompt.n_tokens(), path.c_str());
        } catch (const std::exception & err) {
            SRV_WRN("%s is not restored: %s\n", path.c_str(), err.what());
        }

        slot.prompt_clear();
    }
}

// --keep-slots: save all prompts, those used last at the end
void save_kept() {
    if (!params_base.keep_slots || sleeping) {
        return;
    }

    std::vector<server_slot *> used;
    for (auto & slot : slots) {
        used.push_back(&slot);
    }
    std::sort(used.begin(), used.end(), [](const auto * a, const auto * b) { return a->t_last_used < b->t_last_used; });

    for (auto * slot : used) {
        slot->prompt_save(*prompt_cache);
        prompt_cache->update();
    }

    if (!check_lost().empty()) {
        SRV_ERR("prompts are not saved: %s\n", lost.c_str());
        return;
    }

    fit_checkpoints();

    std::set<std::string> written;
    bool                  all = true;

    int number = 0;
    for (const auto & state : prompt_cache->states) {
        std::error_code ec;

        // files that could not be restored are left alone
        while (!kept.count(kept_file(number)) && std::filesystem::exists(kept_file(number), ec)) {
            number++;
        }

        const std::string path = kept_file(number++);
        try {
            server_slot_save(path, state, identity);
            written.insert(path);
        } catch (const std::exception & err) {
            SRV_ERR("%s is not saved: %s\n", path.c_str(), err.what());
            all = false;
        }
    }

    SRV_INF("saved %zu prompts in %s\n", written.size(), params_base.slot_save_path.c_str());

    // the other files that this server restored or wrote contain older prompts
    if (all) {
        for (const auto & path : kept) {
            if (!written.count(path)) {
                std::error_code ec;
                std::filesystem::remove(path, ec);
            }
        }
        kept.clear();
    }
    kept.insert(written.begin(), written.end());
}

// what read_adapter_ids() and read_identity() read; false: a file cannot be read
bool read_identities() {
    try {
        read_adapter_ids();
        if (!params_base.slot_save_path.empty()) {
            read_identity();
        }
    } catch (const std::exception & err) {
        SRV_ERR("%s\n", err.what());
        return false;
    }
    return true;
}

// --keep-slots: only one server uses the files; false: another one does, or an option is missing
bool lock_kept() {
    if (params_base.keep_slots && (!prompt_cache || params_base.slot_save_path.empty())) {
        SRV_ERR("%s", "--keep-slots requires --slot-save-path and --cache-ram\n");
        return false;
    }
    if (params_base.keep_slots) {
        try {
            kept_lock = std::make_unique<server_file_lock>(params_base.slot_save_path + kept_prefix + "lock");
        } catch (const std::exception & err) {
            SRV_ERR("--keep-slots: %s\n", err.what());
            return false;
        }
    }
    return true;
}
