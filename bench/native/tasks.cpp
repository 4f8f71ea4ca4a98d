// Records what the threads of a graph do between its barriers. Preloaded (LD_PRELOAD) into a process with llama.cpp; see
// ../threads.py.
//
// Times are CPU times of a thread, so there can be more threads than cores: a thread that waits for a core does not count.
// While events are recorded, waiting threads sleep instead of spinning, as they would otherwise take the cores from those
// that work.

#include "ggml-cpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

namespace {

enum Kind : int32_t {
    GRAPH,     // a thread's first event of a graph; value: number of threads
    FINISHED,  // the thread has finished its part
    GO_ON,     // all threads have
    CHUNK,     // the thread gets a part of the node; value: its number
};

struct Event {
    int32_t kind;
    int32_t value;
    int64_t nanoseconds;  // CPU time of the thread
};

using Events = std::vector<Event>;

std::mutex                           lock;
std::vector<std::unique_ptr<Events>> all;  // by thread
std::atomic<bool>                    recording{ false };
std::atomic<int>                     graphs{ 0 };
int                                  n_threads = 0;  // of the current graph
pthread_barrier_t                    barrier;

thread_local Events * mine = nullptr;
thread_local int      seen = 0;  // graphs

int64_t now() {
    timespec time = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return int64_t{ 1000000000 } * time.tv_sec + time.tv_nsec;
}

void record(Kind kind, int32_t value = 0) {
    if (mine == nullptr) {
        const std::lock_guard<std::mutex> guard(lock);
        all.push_back(std::make_unique<Events>());
        mine = all.back().get();
        mine->reserve(1 << 16);
    }
    if (seen != graphs) {
        seen = graphs;
        mine->push_back({ GRAPH, n_threads, now() });
    }
    mine->push_back({ kind, value, now() });
}

// The function of this name in the library that called ours, which may be in no global scope.
template <typename Function> Function * original(const char * name, void * caller) {
    Dl_info found = {};
    dladdr(caller, &found);
    void * library = dlopen(found.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function *>(dlsym(library, name));
}

}  // namespace

extern "C" {

// Forget all events and record those of the graphs from now on.
void tasks_start() {
    for (const auto & each : all) {
        each->clear();
    }
    recording = true;
}

// Write the events, thread after thread: their number, then the events. Returns whether this succeeded.
int tasks_stop(const char * path) {
    recording   = false;
    FILE * file = fopen(path, "wb");
    bool   good = file != nullptr;
    for (size_t i = 0; good && i < all.size(); i++) {
        const int64_t n = int64_t(all[i]->size());
        good = fwrite(&n, sizeof(n), 1, file) == 1 && fwrite(all[i]->data(), sizeof(Event), n, file) == size_t(n);
    }
    return file != nullptr && fclose(file) == 0 && good;
}

ggml_status ggml_graph_compute(ggml_cgraph * graph, ggml_cplan * plan) {
    static const auto compute =
        original<decltype(ggml_graph_compute)>("ggml_graph_compute", __builtin_return_address(0));
    if (!recording) {
        return compute(graph, plan);
    }
    n_threads = plan->n_threads;
    graphs++;
    pthread_barrier_init(&barrier, nullptr, n_threads);
    record(GO_ON);
    const ggml_status status = compute(graph, plan);
    pthread_barrier_destroy(&barrier);
    return status;
}

void ggml_barrier(ggml_threadpool * pool) {
    static const auto wait = original<void(ggml_threadpool *)>("ggml_barrier", __builtin_return_address(0));
    if (!recording) {
        wait(pool);
        return;
    }
    record(FINISHED);
    if (n_threads > 1) {
        pthread_barrier_wait(&barrier);
    }
    record(GO_ON);
}

int ggml_threadpool_chunk_add(ggml_threadpool * pool, int value) {
    static const auto add =
        original<int(ggml_threadpool *, int)>("ggml_threadpool_chunk_add", __builtin_return_address(0));
    const int chunk = add(pool, value);
    if (recording) {
        record(CHUNK, chunk);
    }
    return chunk;
}
}
