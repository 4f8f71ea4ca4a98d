// Included by ggml-rpc.cpp, after rpc_server: operators of a client of the same build, and keep-alive messages.

#pragma once

// The operator of the request, whose sources are views of each other or of the same tensor if they are so at the client:
// the memory of attention depends on whether V is a part of K. nullptr: the request is not valid.
ggml_tensor * rpc_server::deserialize_op(struct ggml_context * ctx, const rpc_msg_get_alloc_size_req & request) {
    ggml_tensor * op = deserialize_tensor(ctx, &request.tensor);
    if (op == nullptr) {
        return nullptr;
    }
    std::unordered_map<uint64_t, ggml_tensor *> viewed;  // tensors that are no views
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const rpc_tensor & from = request.srcs[i];
        if (from.id == 0) {
            continue;
        }
        op->src[i] = deserialize_tensor(ctx, &from);
        if (op->src[i] == nullptr) {
            return nullptr;
        }
        if (from.view_src == 0) {
            viewed.emplace(from.id, op->src[i]);
        }
    }
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        if (request.srcs[i].id == 0 || request.srcs[i].view_src == 0) {
            continue;
        }
        ggml_tensor *& source = viewed[request.srcs[i].view_src];
        if (source == nullptr) {  // the operator does not read all of it
            source         = ggml_dup_tensor(ctx, op->src[i]);
            source->buffer = op->src[i]->buffer;
        }
        op->src[i]->view_src  = source;
        op->src[i]->view_offs = request.srcs[i].view_offs;
    }
    return op;
}

bool rpc_server::supports_op(const rpc_msg_get_alloc_size_req & request, rpc_msg_supports_op_rsp & response) {
    if (request.device >= backends.size() || !same_build) {
        return false;
    }
    struct ggml_init_params params{
        /*.mem_size   =*/ggml_tensor_overhead() * RPC_OP_TENSORS,
        /*.mem_buffer =*/NULL,
        /*.no_alloc   =*/true,
    };
    ggml_context_ptr ctx_ptr{ ggml_init(params) };
    GGML_ASSERT(ctx_ptr != nullptr);
    ggml_tensor * tensor = deserialize_op(ctx_ptr.get(), request);
    if (tensor == nullptr) {
        return false;
    }
    response.result = ggml_backend_dev_supports_op(ggml_backend_get_device(backends[request.device]), tensor);
    return true;
}

// Sends a keep-alive message to the client once a second while the server executes a command.
class rpc_life_signs {
  public:
    explicit rpc_life_signs(socket_ptr sock) : sock(std::move(sock)), thread([this] { run(); }) {}
    ~rpc_life_signs() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop = true;
        }
        changed.notify_one();
        thread.join();
    }

    void set_working(bool value) {
        std::lock_guard<std::mutex> lock(mutex);
        working = value;
    }

  private:
    void run() {
        std::unique_lock<std::mutex> lock(mutex);
        while (!changed.wait_for(lock, std::chrono::seconds(1), [this] { return stop; })) {
            if (working) {
                std::lock_guard<std::mutex> send_lock(sock->send_mutex);
                sock->send_data(&RPC_KEEP_ALIVE, sizeof(RPC_KEEP_ALIVE));
                sock->flush();
            }
        }
    }

    socket_ptr              sock;
    std::mutex              mutex;
    std::condition_variable changed;
    bool                    working = false;
    bool                    stop    = false;
    std::thread             thread;
};
