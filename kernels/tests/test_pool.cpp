// The pool through the interface: many callers at once, more threads than cores, a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "check.h"

namespace {

const Weight& weight() {
    static const Weight found(1024, 1024, 3, 128, true, 1);
    return found;
}

std::vector<float> product(int threads) {
    std::vector<float> x(1024, 0.5F), y(1024);
    const hcx_bcq_weight handle = weight().handle();
    CHECK(hcx_bcq_matmul(&handle, 1, x.data(), 1024, 1, y.data(), 1024, HCX_FAST, HCX_ISA_BEST, threads) == HCX_OK);
    return y;
}

}  // namespace

int main() {
    const auto expected = product(1);
    for (int i = 0; i < 300; ++i) CHECK(product(1 + i % 9) == expected);

    std::vector<std::thread> callers;
    std::vector<int> wrong(6, 0);
    for (size_t c = 0; c < wrong.size(); ++c) {
        callers.emplace_back([&, c] {
            for (int i = 0; i < 100; ++i) wrong[c] += product(3) != expected;
        });
    }
    for (auto& caller : callers) caller.join();
    for (const int count : wrong) CHECK(count == 0);

    // Workers stay behind in a fork: the child makes its own.
    const pid_t child = fork();
    if (child == 0) _exit(product(3) == expected ? 0 : 1);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);

    uint64_t first = 0, second = 0;
    CHECK(hcx_read(weight().packed.get(), weight().packed_bytes, 1, &first) == HCX_OK);
    CHECK(hcx_read(weight().packed.get(), weight().packed_bytes, 4, &second) == HCX_OK);
    uint64_t by_hand = 0, word = 0;
    for (int64_t i = 0; i + 8 <= weight().packed_bytes; i += 8) {
        std::memcpy(&word, weight().packed.get() + i, 8);
        by_hand ^= word;
    }
    CHECK(first == by_hand && second == by_hand);
    return report("pool");
}
