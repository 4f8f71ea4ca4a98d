// Included by transport.cpp, after socket_t::impl: waiting for a peer that sends keep-alive messages.

#pragma once

#ifndef _WIN32
#include <poll.h>
#endif

#include <algorithm>
#include <chrono>

// Waits until the peer takes more. Returns false when it has neither done this nor given a sign of life for too long.
bool socket_t::impl::wait_to_send() {
#ifdef _WIN32
    return fail("sending");
#else
    using clock = std::chrono::steady_clock;
    using std::chrono::milliseconds;
    auto end = clock::now() + std::chrono::seconds(deadline);
    while (true) {
        const auto    left  = std::chrono::duration_cast<milliseconds>(end - clock::now());
        struct pollfd state = { fd, POLLIN | POLLOUT, 0 };
        const int     n     = poll(&state, 1, (int) std::max<int64_t>(0, left.count()));
        if (n < 0 && interrupted()) {
            continue;
        }
        if (n == 0) {
            errno = EAGAIN;  // as in send()
        }
        if (n <= 0) {
            return fail("sending");
        }
        if (!(state.revents & POLLIN)) {
            return true;
        }
        uint64_t word;
        if (!recv_data(&word, sizeof(word))) {
            return false;
        }
        if (word != RPC_KEEP_ALIVE) {
            error = "it sent something without a request";
            return false;
        }
        end = clock::now() + std::chrono::seconds(deadline);
    }
#endif
}
