#include "../server-queue.h"

#include <chrono>
#include <deque>
#include <functional>
#include <iterator>
#include <string>

// Who uses the model between its tasks: a lost one is freed when nobody does.

void server_queue::begin_use(bool wake) {
    while (true) {
        if (wake) {
            wait_until_no_sleep();
        }
        std::unique_lock<std::mutex> lock(mutex_use);
        if (!unavailable.empty()) {
            throw server_unavailable(unavailable);
        }
        if (!wake || !unloaded) {
            n_users++;
            return;
        }
    }
}

bool server_queue::begin_sleep() {
    std::unique_lock<std::mutex> lock(mutex_use);
    unloaded = n_users == 0;
    return unloaded;
}

void server_queue::end_sleep() {
    std::unique_lock<std::mutex> lock(mutex_use);
    unloaded = false;
}

void server_queue::end_use() {
    std::unique_lock<std::mutex> lock(mutex_use);
    n_users--;
    condition_use.notify_all();
}

void server_queue::set_unavailable(const std::string & why) {
    std::unique_lock<std::mutex> lock(mutex_use);
    unavailable = why;
}

bool server_queue::wait_until_unused(int timeout_ms) {
    std::unique_lock<std::mutex> lock(mutex_use);
    return condition_use.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] { return n_users == 0; });
}

void server_queue::drain(const std::function<void(const server_task &)> & fail) {
    std::deque<server_task> tasks;
    {
        std::unique_lock<std::mutex> lock(mutex_tasks);
        for (auto * from : { &queue_tasks, &queue_tasks_deferred }) {
            std::move(from->begin(), from->end(), std::back_inserter(tasks));
            from->clear();
        }
    }
    for (const auto & task : tasks) {
        fail(task);
    }
}

bool server_queue::wait_for_termination(int timeout_ms) {
    std::unique_lock<std::mutex> lock(mutex_tasks);
    return condition_tasks.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] { return !running; });
}
