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
#ifdef __linux__
#include <sched.h>

#include <cstring>
#endif

namespace catmllm::pvcp {
namespace {

// The others are nearly done when the caller is: waiting for them awake, some microseconds, beats sleeping.
constexpr int kAwake = 2000;

struct Job {
    const std::function<void()>* work;
    std::size_t wanted;                  // threads that may still join
    std::atomic<std::size_t> inside{0};  // threads that joined and have not left
};

struct Pool {
    std::mutex mutex;
    std::condition_variable come;  // to threads: there is a job
    std::condition_variable done;  // to callers: a thread has left a job
    std::vector<Job*> jobs;
    std::vector<std::thread::native_handle_type> threads;
#ifdef __linux__
    cpu_set_t allowed = {};  // where the threads may run
#endif
};

// Keeps the threads off the processor that the caller works on. Linux wakes a thread where it slept, and if
// that is the caller's processor it may wait there for 4 ms, more than a batch takes, while another is idle.
void make_way([[maybe_unused]] Pool& pool, [[maybe_unused]] bool anew) {
#ifdef __linux__
    cpu_set_t wanted;
    const int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE || sched_getaffinity(0, sizeof wanted, &wanted) != 0) return;
    if (CPU_COUNT(&wanted) > 1) CPU_CLR(here, &wanted);
    if (!anew && CPU_EQUAL(&wanted, &pool.allowed)) return;
    for (const auto thread : pool.threads) (void)pthread_setaffinity_np(thread, sizeof wanted, &wanted);
    pool.allowed = wanted;
#endif
}

void serve(Pool& pool) {
    std::unique_lock<std::mutex> lock(pool.mutex);
    for (;;) {
        const auto open =
            std::find_if(pool.jobs.begin(), pool.jobs.end(), [](Job* job) { return job->wanted > 0; });
        if (open == pool.jobs.end()) {
            pool.come.wait(lock);
            continue;
        }
        Job& job = **open;
        --job.wanted;
        ++job.inside;
        lock.unlock();
        (*job.work)();
        const bool last = job.inside.fetch_sub(1) == 1;  // after this the job may be gone
        lock.lock();
        if (last) pool.done.notify_all();
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
    const auto finished = [&] { return job.inside.load() == 0; };
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        const std::size_t before = p.threads.size();
        try {
            p.jobs.push_back(&job);
            p.threads.reserve(helpers);
            while (p.threads.size() < helpers) {
                std::thread thread(serve, std::ref(p));
                p.threads.push_back(thread.native_handle());
                thread.detach();
            }
        } catch (const std::exception&) {  // no memory or no thread to be had: fewer work on it
        }
        make_way(p, p.threads.size() > before);
    }
    for (std::size_t i = 0; i < helpers; ++i) p.come.notify_one();
    work();
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        p.jobs.erase(std::remove(p.jobs.begin(), p.jobs.end(), &job), p.jobs.end());  // nobody joins any more
    }
    for (int i = 0; i < kAwake && !finished(); ++i) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    if (finished()) return;
    std::unique_lock<std::mutex> lock(p.mutex);
    p.done.wait(lock, finished);
}

}  // namespace catmllm::pvcp
