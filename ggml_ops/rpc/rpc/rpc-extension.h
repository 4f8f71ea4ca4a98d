// Included by ggml-rpc.cpp, next to its commands: what only builds with the patches exchange, and the numbers of their
// operators.

#pragma once

#include "ggml-kda-scan.h"

#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

// An extension of the protocol that only patched builds use. A server announces it in the byte `padding` of its answer to
// HELLO, which is 0 in upstream's servers and which upstream's clients ignore. Only then does the client send RPC_CMD_BUILD,
// and only then does the server send keep-alive messages.
static constexpr uint8_t RPC_EXTENSION = 1;

enum rpc_cmd_extension {
    RPC_CMD_BUILD = 0xe0,  // both sides send the hash of the sources they were built from
    RPC_CMD_SUPPORTS_OP,   // for operators that upstream does not have
};

// The operators that upstream does not have start here. Their numbers mean something only to a build of the same sources.
static constexpr uint32_t RPC_FIRST_OWN_OP = GGML_OP_KDA_CONV;
static_assert(RPC_FIRST_OWN_OP == 101, "the numbers below this must be upstream's");

#pragma pack(push, 1)

// RPC_CMD_BUILD, request and answer
struct rpc_msg_build {
    char sources[64];  // a sha256 in hex, or zeros if unknown
};

// RPC_CMD_SUPPORTS_OP; the request is rpc_msg_get_alloc_size_req
struct rpc_msg_supports_op_rsp {
    uint8_t result;
};

#pragma pack(pop)

static rpc_msg_build rpc_own_build() {
    rpc_msg_build build = {};
#ifdef GGML_KIMI_BUILD_ID
    static_assert(sizeof(GGML_KIMI_BUILD_ID) == sizeof(build.sources) + 1,
                  "GGML_KIMI_BUILD_ID must be a sha256 in hex");
    memcpy(build.sources, GGML_KIMI_BUILD_ID, sizeof(build.sources));
#endif
    return build;
}

static bool rpc_is_own_build(const rpc_msg_build & other) {
    const rpc_msg_build own = rpc_own_build();
    return own.sources[0] != 0 && memcmp(own.sources, other.sources, sizeof(own.sources)) == 0;
}

// Most tensors that deserialize_op creates.
static constexpr int RPC_OP_TENSORS = 1 + 2 * GGML_MAX_SRC;

// Logs once per endpoint and answer which operators its server runs.
static void log_build(const std::string & endpoint, bool same_build, bool is_patched) {
    static std::mutex                           mutex;
    static std::unordered_map<std::string, int> logged;
    std::lock_guard<std::mutex>                 lock(mutex);
    const int                                   state = 1 + same_build + 2 * is_patched;
    if (std::exchange(logged[endpoint], state) == state) {
        return;
    }
    if (same_build) {
        GGML_LOG_INFO("RPC server %s is this build: it runs the operators that upstream does not have\n",
                      endpoint.c_str());
    } else {
        GGML_LOG_WARN("RPC server %s is %s: it runs upstream's graph\n", endpoint.c_str(),
                      is_patched ? "built from other sources" : "an upstream build");
    }
}
