// Runs CUDA kernels on the CPU, one block after another, a block's threads as fibers, and watches their
// memory.
//
// The kernels are compiled with -fsanitize=thread but linked against the __tsan_* functions at the end of
// this file, so that each of their loads and stores comes by here. A kernel is stopped at the first access
// outside the tensors that its operator took pointers of, the first read of shared memory that nobody has
// written, the first conflict of two threads with no barrier between them (two blocks: at all), a write
// through a const pointer, a misaligned access; and at a barrier or a shuffle that not all threads reach.
// Which thread goes on, and after how many accesses, is drawn from a seed: what depends on it is a race that
// slipped by, and shows in the results.
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  void* stream;
};
// The shared memory of the block that runs: a launch's own, and the section of the kernels' variables.
alignas(64) uint64_t block_memory[(99 << 10) / 8];
extern "C" char __start_block_shared[], __stop_block_shared[];

namespace emulated {
dim3 thread, block;

namespace {
constexpr size_t STACK = 1 << 16;
constexpr size_t SHARED = 48 << 10, SHARED_ON_REQUEST = 99 << 10;  // of compute capability 8.6
constexpr int NONE = -1, MANY = -2;

struct Mark {  // the last access of its kind: in which stretch between two barriers, by whom
  int64_t stretch = 0;
  int block = NONE, thread = NONE;
};
struct Cell {  // of a tensor an element, of shared memory four bytes
  Mark write, read;
  bool written = false, atomic = false;
};
struct Range {
  uintptr_t start, end;
  size_t unit;
  bool writable;
  std::vector<Cell> cells;
  Range(const void* p, size_t bytes, size_t unit, bool writable)
      : start(uintptr_t(p)), end(start + bytes), unit(unit), writable(writable), cells(bytes / unit + 1) {}
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  enum { READY, BARRIER, SHUFFLE, ENDED } state;
  bool begun;
  int line;
  unsigned mask, from;
  uint64_t given, got;
};

std::vector<Fiber> fibers(1024);
char* stacks = (char*)mmap(nullptr, 1024 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
jmp_buf scheduler;
int running = NONE, threads;  // NONE: host code
int64_t stretches, launched;  // stretches are counted through; the launch's first one
void (*call)(const void*);
const char* parameters;
size_t parameter_bytes;
std::vector<Range> reachable, shared;
std::map<void (*)(), size_t> allowed;
std::string fault;
std::mt19937_64 draw;
uint64_t seed, every;  // 0: in order; 0: a thread runs until it must wait
int the_stream;

void leave() {
  if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

void fail(const void* from, const char* format, ...) {
  char text[200], where[100] = "";
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  Dl_info file;
  if (from && dladdr(from, &file))  // for addr2line -e
    snprintf(where, sizeof where, ", at %#tx", (const char*)from - 1 - (const char*)file.dli_fbase);
  if (fault.empty())
    fault = text + std::string(" (block ") + std::to_string(block.x) + ", thread " +
            std::to_string(thread.x) + where + ")";
  if (running != NONE) leave();  // for good
}

bool meets(const Mark& other) {  // may `other` happen at the same time as what runs now?
  if (other.stretch < launched) return false;
  return other.block != int(block.x) || (other.stretch == stretches && other.thread != running);
}

void note(Mark& mark) {
  const bool same = mark.stretch >= launched;
  const int in = same && mark.block != int(block.x) ? MANY : int(block.x);
  const int by = same && mark.stretch == stretches && mark.thread != running ? MANY : running;
  mark = {stretches, in, by};
}

void access(const void* p, size_t bytes, bool write, bool atomic, const void* from) {
  const char* at = (const char*)p;
  const char* stack = stacks + running * STACK;
  if (running == NONE || (at >= stack && at < stack + STACK)) return;
  if (!write && (p == &thread || p == &block || (at >= parameters && at < parameters + parameter_bytes)))
    return;
  if (every && draw() % every == 0) leave();
  const uintptr_t start = uintptr_t(p);
  for (auto* ranges : {&shared, &reachable})
    for (Range& range : *ranges) {
      if (start < range.start || start + bytes > range.end) continue;
      if (write && !range.writable) fail(from, "write through a const pointer");
      for (size_t c = (start - range.start) / range.unit; c <= (start + bytes - 1 - range.start) / range.unit;
           ++c) {
        Cell& cell = range.cells[c];
        if (ranges == &shared && !cell.written && (!write || atomic))
          fail(from, "shared memory is read before it is written");
        if (meets(cell.write) && !(atomic && cell.atomic))
          fail(from, "race: another thread's write of the same bytes");
        if (write && meets(cell.read)) fail(from, "race: another thread's read of the same bytes");
        if (write) note(cell.write), cell.written = true, cell.atomic = atomic;
        else note(cell.read);
      }
      return;
    }
  fail(from, "%s of %zu bytes outside of every tensor and of shared memory", write ? "write" : "read", bytes);
}

void fiber() {
  for (;;) {
    call(parameters);
    fibers[running].state = Fiber::ENDED;
    leave();
  }
}

void go_on(int t) {
  running = thread.x = t;
  if (!_setjmp(scheduler)) {
    if (fibers[t].begun) _longjmp(fibers[t].at, 1);
    fibers[t].begun = true;
    setcontext(&fibers[t].start);
  }
  running = NONE;
}

void release_barrier() {
  for (int t = 0; t < threads; ++t)
    if (fibers[t].state != Fiber::BARRIER || fibers[t].line != fibers[0].line)
      return fail(nullptr,
                  "stuck: thread %d does not come to the barrier or shuffle where others wait, line %d", t,
                  std::max(fibers[0].line, fibers[t].line));
  for (int t = 0; t < threads; ++t) fibers[t].state = Fiber::READY;
  ++stretches;
}

void run_block() {
  ++stretches;
  for (Range& range : shared) range.cells.assign(range.cells.size(), Cell());
  for (int t = 0; t < threads; ++t) {
    fibers[t].state = Fiber::READY;
    if (fibers[t].begun) continue;  // it stands at the end of fiber()
    getcontext(&fibers[t].start);
    fibers[t].start.uc_stack.ss_sp = stacks + t * STACK, fibers[t].start.uc_stack.ss_size = STACK;
    makecontext(&fibers[t].start, fiber, 0);
  }
  std::vector<int> order;
  while (fault.empty()) {
    order.clear();
    bool ended = true;
    for (int t = 0; t < threads; ++t) {
      if (fibers[t].state == Fiber::READY) order.push_back(t);
      ended &= fibers[t].state == Fiber::ENDED;
    }
    if (ended) return;
    if (order.empty()) release_barrier();
    if (seed) std::shuffle(order.begin(), order.end(), draw);
    for (size_t i = 0; i < order.size() && fault.empty(); ++i) go_on(order[i]);
  }
  for (Fiber& f : fibers) f.begun = false;  // left where they stood
}
}  // namespace

void barrier(int line) {
  fibers[running].state = Fiber::BARRIER, fibers[running].line = line;
  leave();
}

uint64_t exchange(uint64_t given, unsigned from, unsigned mask, int line) {
  Fiber &me = fibers[running], *warp = &fibers[running / 32 * 32];
  me.state = Fiber::SHUFFLE, me.line = line, me.mask = mask, me.given = given, me.from = from;
  if (!(mask >> running % 32 & 1) || from > 31 || !(mask >> from & 1))
    fail(nullptr, "line %d: a lane outside of the mask", line);
  bool all = true;
  for (int l = 31; l >= 0 && all; --l)
    if (mask >> l & 1) all = warp[l].state == Fiber::SHUFFLE && warp[l].line == line && warp[l].mask == mask;
  for (int l = 0; l < 32 && all; ++l)
    if (mask >> l & 1) warp[l].got = warp[warp[l].from].given, warp[l].state = Fiber::READY;
  leave();  // a lane whose others never come stays behind: stuck, says release_barrier
  return fibers[running].got;
}

int add(int* at, int by) {
  access(at, sizeof *at, true, true, __builtin_return_address(0));
  const int before = *at;
  *at += by;
  return before;
}

void reach(const void* start, size_t bytes, size_t unit, bool writable) {
  if (!bytes) return;
  Range now(start, bytes, unit, writable);
  for (auto it = reachable.begin();
       it != reachable.end();) {  // one tensor, or parts of one: they become one range
    if (it->end <= now.start || now.end <= it->start) {
      ++it;
      continue;
    }
    if (it->start <= now.start && now.end <= it->end && it->writable >= writable) return;
    const uintptr_t from = std::min(it->start, now.start), to = std::max(it->end, now.end);
    now = Range((const void*)from, to - from, std::min(unit, it->unit), writable || it->writable);
    it = reachable.erase(it);
  }
  reachable.push_back(std::move(now));
}

int stream(int32_t, void** stream) {
  reachable.clear();
  *stream = &the_stream;
  return 0;
}

int clear(void* p, int value, size_t bytes, void* stream) {
  const uintptr_t start = uintptr_t(p);
  bool inside = false;
  for (const Range& r : reachable) inside |= r.writable && r.start <= start && start + bytes <= r.end;
  if (!inside) fail(nullptr, "memset outside of every tensor");
  if (stream != &the_stream) fail(nullptr, "memset on another stream than the caller's");
  if (fault.empty()) std::fill((char*)p, (char*)p + bytes, char(value));
  return !fault.empty();
}

size_t statics() { return __stop_block_shared - __start_block_shared; }  // of all kernels together: no less

int allow_shared(void (*kernel)(), int bytes) {
  if (bytes < 0 || bytes + statics() > SHARED_ON_REQUEST)
    fail(nullptr, "%d bytes of shared memory are not to be had", bytes);
  allowed[kernel] = bytes;
  return !fault.empty();
}

int launch(const cudaLaunchConfig_t& how, void (*kernel)(), void (*call_)(const void*), const void* with,
           size_t size) {
  call = call_, parameters = (const char*)with, parameter_bytes = size, threads = how.blockDim.x;
  const size_t dynamic = how.dynamicSmemBytes;
  if (how.gridDim.x < 1 || how.gridDim.x > 0x7fffffff || threads < 1 || threads > 1024)
    fail(nullptr, "a grid of %u blocks", how.gridDim.x);
  if (dynamic > std::max(SHARED - statics(), allowed[kernel]))
    fail(nullptr, "%zu bytes of shared memory: not without asking", dynamic);
  if (how.stream != &the_stream) fail(nullptr, "launched on another stream than the caller's");
  if (!fault.empty()) return 1;
  shared.clear();
  shared.emplace_back(__start_block_shared, statics(), 4, true);
  shared.emplace_back(block_memory, dynamic, 4, true);
  launched = stretches + 1;
  draw.seed(seed);
  std::vector<unsigned> order;
  for (unsigned b = 0; b < how.gridDim.x; ++b) order.push_back(b);
  if (seed) std::shuffle(order.begin(), order.end(), draw);
  for (size_t b = 0; b < order.size() && fault.empty(); ++b) block.x = order[b], run_block();
  return !fault.empty();
}

void check(int failed) {
  if (failed) throw std::runtime_error(std::exchange(fault, ""));
}
}  // namespace emulated

extern "C" {
__attribute__((visibility("default"))) void schedule(uint64_t seed, uint64_t every) {
  emulated::seed = seed, emulated::every = every;
}

// before an access through a pointer that is not aligned to its type
void __ubsan_handle_type_mismatch_v1(void*, void*) {
  if (emulated::running != emulated::NONE) emulated::fail(__builtin_return_address(0), "misaligned access");
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
int __tsan_atomic32_fetch_add(volatile int* p, int by, int) {
  return __atomic_fetch_add(p, by, __ATOMIC_SEQ_CST);
}  // host code's
#define WATCH(name, bytes, write) \
  void name(void* p) { emulated::access(p, bytes, write, false, __builtin_return_address(0)); }
#define WATCH_ALL(n)              \
  WATCH(__tsan_read##n, n, false) \
  WATCH(__tsan_write##n, n, true) \
  WATCH(__tsan_unaligned_read##n, n, false) WATCH(__tsan_unaligned_write##n, n, true)
WATCH_ALL(1) WATCH_ALL(2) WATCH_ALL(4) WATCH_ALL(8) WATCH_ALL(16) void __tsan_read_range(void* p, long n) {
  emulated::access(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, long n) { emulated::access(p, n, true, false, __builtin_return_address(0)); }
}
