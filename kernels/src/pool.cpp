// Each thread begins with a contiguous share of the items, so that it reads one sequential stream, and then takes from
// the shares of others: a thread that lost its core delays a job by the item it holds, not by its share. A job needs no
// thread but the caller's: workers that come late find it closed.
//
// Workers wait for the next job by spinning for a moment, because waking one costs more than a small product. A worker
// that lost its core to another process lately does not spin at all.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sys/resource.h>
#elif defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hcx {
namespace {

constexpr int kMaxThreads = 256;
constexpr auto kSpin = std::chrono::microseconds(60);  // about what waking a sleeping thread costs
constexpr int kQuietJobs = 256;                        // without spinning after the core was lost once

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Spins until `done` or until the time is up; returns what `done` said last.
template <class Done>
bool spin_until(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

int64_t times_preempted() {
#if defined(__linux__)
    rusage usage{};
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
#else
    return 0;
#endif
}

class Pool {
   public:
    void run(int threads, int64_t items, ItemFunction function, void* context) {
        threads = grow(threads);
        function_ = function;
        context_ = context;
        threads_ = threads;
        for (int i = 0; i < threads; ++i) {
            shares_[i].next.store(items * i / threads, std::memory_order_relaxed);
            shares_[i].end = items * (i + 1) / threads;
        }
        open();
        work(0);
        close();
    }

    std::mutex busy;

   private:
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    // The state of a job: its number, whether it takes workers, and how many are inside.
    static constexpr uint64_t kOpen = 1ULL << 31, kInside = kOpen - 1, kJob = 1ULL << 32;

    void open() {
        const uint64_t state = state_.load(std::memory_order_relaxed);
        state_.store(((state / kJob) + 1) * kJob | kOpen, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
    }

    void close() {
        state_.fetch_and(~kOpen, std::memory_order_seq_cst);
        const auto empty = [this] { return (state_.load(std::memory_order_seq_cst) & kInside) == 0; };
        if (spin_until(empty)) return;
        std::unique_lock<std::mutex> lock(sleep_);
        waiting_.store(true, std::memory_order_seq_cst);
        left_.wait(lock, empty);
        waiting_.store(false, std::memory_order_seq_cst);
    }

    void work(int own) {
        for (int i = 0; i < threads_; ++i) {
            Share& share = shares_[(own + i) % threads_];
            for (;;) {
                const int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
                if (item >= share.end) break;
                function_(context_, item);
            }
        }
    }

    bool enter(uint64_t& state) {
        while ((state & kOpen) != 0) {
            if (state_.compare_exchange_weak(state, state + 1, std::memory_order_seq_cst)) return true;
        }
        return false;
    }

    void leave() {
        const uint64_t state = state_.fetch_sub(1, std::memory_order_seq_cst) - 1;
        if ((state & kInside) == 0 && waiting_.load(std::memory_order_seq_cst)) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            left_.notify_all();
        }
    }

    void serve(int number) {
        uint64_t seen = 0;
        int64_t preempted = times_preempted();
        int quiet = 0;
        const auto changed = [this, &seen] { return state_.load(std::memory_order_seq_cst) / kJob != seen; };
        for (;;) {
            if (quiet > 0 || !spin_until(changed)) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleepers_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, changed);
                sleepers_.fetch_sub(1, std::memory_order_seq_cst);
            }
            uint64_t state = state_.load(std::memory_order_seq_cst);
            seen = state / kJob;
            if (enter(state)) {
                seen = state / kJob;
                if (number < threads_) work(number);
                leave();
            }
            const int64_t now = times_preempted();
            quiet = now != preempted ? kQuietJobs : (quiet > 0 ? quiet - 1 : 0);
            preempted = now;
        }
    }

    // Makes sure of workers for `threads`, and says how many there are with the caller.
    int grow(int threads) {
        if (threads > kMaxThreads) threads = kMaxThreads;
        while (workers_ < threads - 1) {
            try {
                std::thread([this, number = workers_ + 1] { serve(number); }).detach();
            } catch (const std::system_error&) {
                return workers_ + 1;
            }
            ++workers_;
        }
        return threads;
    }

    std::atomic<uint64_t> state_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> waiting_{false};
    std::mutex sleep_;
    std::condition_variable wake_, left_;
    ItemFunction function_ = nullptr;
    void* context_ = nullptr;
    int threads_ = 1;
    int workers_ = 0;
    Share shares_[kMaxThreads];
};

// Never destroyed: workers may still wait in it when the process ends. A forked child has no workers: it gets a new
// pool.
std::atomic<Pool*> current{nullptr};

Pool* pool() {
    Pool* found = current.load(std::memory_order_acquire);
    if (found != nullptr) return found;
    static std::mutex making;
    std::lock_guard<std::mutex> lock(making);
    found = current.load(std::memory_order_acquire);
    if (found == nullptr) {
        found = new (std::nothrow) Pool;
        current.store(found, std::memory_order_release);
#if defined(__unix__) || defined(__APPLE__)
        static const int registered =
            pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
        static_cast<void>(registered);
#endif
    }
    return found;
}

}  // namespace

void run_parallel(int threads, int64_t items, ItemFunction function, void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads > 1) {
        Pool* shared = pool();
        if (shared != nullptr) {
            std::unique_lock<std::mutex> lock(shared->busy, std::try_to_lock);
            if (lock.owns_lock()) {
                shared->run(threads, items, function, context);
                return;
            }
        }
    }
    for (int64_t item = 0; item < items; ++item) function(context, item);
}

}  // namespace hcx
