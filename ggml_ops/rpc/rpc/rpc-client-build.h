// Included by ggml-rpc.cpp, after rpc_dispatcher and serialize_tensor: what the client asks a server of the same build.

#pragma once

// Compares the builds of client and server: sets same_build to whether they have the same sources. Returns false if the
// server does not answer.
bool rpc_dispatcher::compare_builds() {
    rpc_msg_build request  = rpc_own_build();
    rpc_msg_build response = {};
    if (!send_rpc_cmd(sock, (rpc_cmd) RPC_CMD_BUILD, &request, sizeof(request), &response, sizeof(response))) {
        return false;
    }
    same_build = rpc_is_own_build(response);
    return true;
}

void rpc_dispatcher::traffic(uint64_t & sent, uint64_t & received) const {
    sent     = sock ? sock->n_sent() : 0;
    received = sock ? sock->n_received() : 0;
}

bool rpc_dispatcher::supports_op(uint32_t device, const ggml_tensor * op) {
    if (!same_build) {
        return false;
    }
    auto request    = std::make_shared<rpc_msg_get_alloc_size_req>();
    request->device = device;
    request->tensor = serialize_tensor(op);
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        request->srcs[i] = serialize_tensor(op->src[i]);
    }
    // the answer depends on operator, parameters, types, shapes and buffers
    rpc_msg_get_alloc_size_req key       = *request;
    const auto                 anonymize = [](rpc_tensor & tensor) {
        tensor.id       = tensor.id != 0;
        tensor.view_src = tensor.data = 0;
        memset(tensor.src, 0, sizeof(tensor.src));
        memset(tensor.name, 0, sizeof(tensor.name));
    };
    anonymize(key.tensor);
    for (rpc_tensor & src : key.srcs) {
        anonymize(src);
    }
    const uint64_t hash = fnv_hash((const uint8_t *) &key, sizeof(key));
    {
        std::lock_guard<std::mutex> lock(supported_mutex);
        auto                        it = supported.find(hash);
        if (it != supported.end()) {
            return it->second;
        }
    }
    rpc_msg_supports_op_rsp response;
    send((rpc_cmd) RPC_CMD_SUPPORTS_OP, request, sizeof(*request), &response, sizeof(response));
    if (failed) {
        return true;  // the graph cannot be computed anyway, so keep it as it is
    }
    std::lock_guard<std::mutex> lock(supported_mutex);
    return supported[hash] = response.result != 0;
}

static const ggml_tensor * rpc_viewed(const ggml_tensor * tensor) {
    return tensor->view_src ? tensor->view_src : tensor;
}

// On what the memory behind a result depends besides its shape: one shape stands for several numbers of tokens and
// sequences here, with different memory of the kernels. Zeros for other operators.
struct rpc_work_key {
    uint64_t n_seqs;
    struct {
        uint64_t type;
        uint64_t ne[GGML_MAX_DIMS];
        uint64_t nb[GGML_MAX_DIMS];
        uint64_t view_offs;
    } attention[5];  // the sources
    uint64_t v_in_k;

    static rpc_work_key of(const ggml_tensor * tensor) {
        rpc_work_key key = {};
        key.n_seqs       = tensor->op == GGML_OP_KDA_SCAN ? tensor->src[GGML_KDA_SCAN_ROWS]->ne[0] : 0;
        if (tensor->op != GGML_OP_FLASH_ATTN_EXT && tensor->op != GGML_OP_LATENT_ATTN) {
            return key;
        }
        // more keys can need less memory, so the size for the longest cache is not enough. The number of keys changes
        // once in 256 tokens, and is the same in all layers.
        for (int i = 0; i < 5; i++) {
            if (const ggml_tensor * src = tensor->src[i]) {
                key.attention[i].type      = 1 + src->type;
                key.attention[i].view_offs = src->view_offs;
                for (int j = 0; j < GGML_MAX_DIMS; j++) {
                    key.attention[i].ne[j] = src->ne[j];
                    key.attention[i].nb[j] = src->nb[j];
                }
            }
        }
        const ggml_tensor * k = tensor->src[1];
        const ggml_tensor * v = tensor->src[2];
        key.v_in_k            = rpc_viewed(k) == rpc_viewed(v) && k->view_offs == v->view_offs;
        return key;
    }
};
