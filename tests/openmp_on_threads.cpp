// A stand-in for libgomp that GCC's thread sanitizer can watch: the entry points that the C++ core calls, on std::thread.
// The real one waits with futexes, of which the sanitizer does not know: it would report every parallel loop.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {
thread_local std::atomic<long>* taken;  // iterations of the parallel region's one loop; orders nothing, as in libgomp
thread_local long first, last, run;
}  // namespace

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::atomic<long> of_all{0};
  const auto work = [&] {
    taken = &of_all;
    body(data);
  };
  std::vector<std::thread> others;
  for (unsigned t = 1; t < threads; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  *begin = first + taken->fetch_add(run, std::memory_order_relaxed);
  *end = std::min(*begin + run, last);
  return *begin < last;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long from, long to, long, long chunk, long* begin, long* end) {
  first = from, last = to, run = chunk;
  return GOMP_loop_nonmonotonic_dynamic_next(begin, end);
}

void GOMP_loop_end_nowait() {}
}
