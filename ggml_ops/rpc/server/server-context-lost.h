// A model whose device is lost: requests fail, and the model is loaded again.
// Members of server_context_impl: server-context.cpp includes this file in its body.

// From now on every new request fails.
void set_lost(const std::string & reason) {
    lost = reason;
    queue_tasks.set_unavailable(lost + "; the model is being loaded again");
}

const std::string & check_lost() {
    for (const llama_context * ctx : { ctx_tgt, ctx_dft }) {
        const char * reason = ctx && lost.empty() ? llama_device_failure(ctx) : nullptr;
        if (reason) {
            set_lost(reason);
        }
    }
    return lost;
}

// Loads the model, with increasing pauses between the attempts. A model that was loaded before is loaded until this
// succeeds or the server ends. The first time, an attempt must fail because a remote device is lost to be repeated.
bool load_model_repeatedly(common_params & params) {
    const bool is_first = !sleeping;
    if (is_first) {
        params_given = params;
    } else {
        params_given.lora_adapters = params_base.lora_adapters;  // a request may have set their scales
    }
    for (int wait_ms = 500;; wait_ms = std::min(2 * wait_ms, 15000)) {
        common_params attempt = params_given;
        if (load_model(attempt)) {
            params = attempt;
            return true;
        }
        destroy();
        if (is_first && (is_initialized || n_lost_connections() == n_lost_before)) {
            return false;
        }
        SRV_WRN("the model cannot be loaded, next attempt in %.1f s\n", wait_ms / 1000.0);
        if (queue_tasks.wait_for_termination(wait_ms)) {
            return false;
        }
    }
}

// The model is lost with the states of all slots: fails all requests, and loads it again as soon as this is possible.
void reload_lost_model() {
    SRV_ERR("%s; loading the model again\n", lost.c_str());

    abort_all_slots(lost);
    do {
        queue_tasks.drain([this](const server_task & task) { send_error(task, lost, ERROR_TYPE_UNAVAILABLE); });
    } while (!queue_tasks.wait_until_unused(100));
    queue_tasks.drain([this](const server_task & task) { send_error(task, lost, ERROR_TYPE_UNAVAILABLE); });

    destroy();
    sleeping = true;  // for load_model() and the destructor: there is no model

    const int64_t t_start = ggml_time_ms();
    if (!load_model_repeatedly(params_base)) {
        return;
    }

    lost.clear();
    sleeping = false;
    restore_kept();
    SRV_INF("the model is loaded again after %.1f s\n", (ggml_time_ms() - t_start) / 1000.0);
    queue_tasks.set_available();
}
