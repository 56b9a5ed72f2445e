#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace catmllm::pvcp {
namespace {

struct Job {
    const std::function<void()>* work;
    std::size_t wanted;      // threads that may still join
    std::size_t inside = 0;  // threads that joined and have not left
};

struct Pool {
    std::mutex mutex;
    std::condition_variable come;  // to threads: there is a job
    std::condition_variable done;  // to callers: a thread has left a job
    std::vector<Job*> jobs;
    std::size_t threads = 0;
};

void serve(Pool& pool) {
    std::unique_lock<std::mutex> lock(pool.mutex);
    for (;;) {
        const auto open = std::find_if(pool.jobs.begin(), pool.jobs.end(), [](Job* job) { return job->wanted > 0; });
        if (open == pool.jobs.end()) {
            pool.come.wait(lock);
            continue;
        }
        Job& job = **open;
        --job.wanted;
        ++job.inside;
        lock.unlock();
        (*job.work)();
        lock.lock();
        if (--job.inside == 0) pool.done.notify_all();
    }
}

// Never destroyed: its threads may still wait in it when the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    Pool* known = the_pool.load(std::memory_order_acquire);
    if (known != nullptr) return *known;
#if defined(__unix__) || defined(__APPLE__)
    // The child of a fork has none of the threads; its pool may even be locked by one.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    (void)registered;
#endif
    auto* made = new Pool;
    if (the_pool.compare_exchange_strong(known, made)) return *made;
    delete made;
    return *known;
}

}  // namespace

void run_together(std::size_t helpers, const std::function<void()>& work) {
    if (helpers == 0) {
        work();
        return;
    }
    Pool& p = pool();
    Job job{&work, helpers};
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        try {
            p.jobs.push_back(&job);
            for (; p.threads < helpers; ++p.threads) std::thread(serve, std::ref(p)).detach();
        } catch (const std::exception&) {  // no memory or no thread to be had: fewer work on it
        }
    }
    for (std::size_t i = 0; i < helpers; ++i) p.come.notify_one();
    work();
    std::unique_lock<std::mutex> lock(p.mutex);
    p.jobs.erase(std::remove(p.jobs.begin(), p.jobs.end(), &job), p.jobs.end());  // nobody joins any more
    p.done.wait(lock, [&] { return job.inside == 0; });
}

}  // namespace catmllm::pvcp
