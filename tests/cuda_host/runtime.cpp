// Runs a launch: every CUDA thread is a fiber, blocks are resident up to a limit. One fiber runs at
// a time; it gives way at barriers, warp operations, pauses and, in random order, at atomics and
// fences.
#include "runtime.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <algorithm>
#include <random>
#include <string>
#include <tuple>

host::Index host::index;
alignas(128) char host::dynamic_shared[host::MAX_SHARED];
Launch* launch;
Thread* current;
char *static_lo, *static_hi, *code_lo, *code_hi;

namespace {
using Blocks = std::vector<std::unique_ptr<Block>>;
Blocks resident;
Block* loaded;                            // the block whose static shared memory is in place
char* scheduler_stack;
sigjmp_buf failed;
pthread_t runner;
std::mt19937_64 generator;
std::vector<char*> stacks;
size_t stacks_made;
bool progress;                            // a thread of the running block did more than poll
constexpr size_t MAX_STACKS = 24 << 10;   // two mappings each; Linux allows about 65,000

uint32_t below(uint32_t n) { return generator() % n; }

// ---- fibers
extern "C" void host_switch(char** save, char* load);
asm(R"(
.globl host_switch
.type host_switch,@function
host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size host_switch, .-host_switch
)");

char* take_stack() {
  if (stacks.empty()) {
    if (stacks_made == MAX_STACKS) fault("launch", "more than %zu threads at a time", MAX_STACKS);
    void* m = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) fault("launch", "no memory for the stacks of %zu threads", stacks_made);
    ++stacks_made;
    mprotect(m, PAGE, PROT_NONE);
    return static_cast<char*>(m);
  }
  char* s = stacks.back();
  stacks.pop_back();
  return s;
}

void make_ready(Thread& t) {
  t.state = READY;
  t.block->ready.push_back(&t);
}

// Last in, first out, so a warp runs as far as it can before the next one does: the cache likes it.
void make_all_ready(Thread* threads, uint32_t n, uint32_t mask = ~0u) {
  auto& ready = threads->block->ready;
  const size_t before = ready.size();
  for (uint32_t i = 0; i < n; ++i)
    if (mask >> i % 32 & 1) make_ready(threads[i]);
  if (launch->order == ASCENDING) std::reverse(ready.begin() + before, ready.end());
  if (launch->order == RANDOM) std::shuffle(ready.begin() + before, ready.end(), generator);
}

void finish(Thread&);
void give_way();

void fiber() {
  launch->kernel->call(launch->args);
  finish(*current);
  give_way();
}

// Takes a thread that can go on and makes it the current one.
Thread& take(std::vector<Thread*>& ready) {
  if (launch->order == RANDOM && below(8) == 0) std::swap(ready[below(ready.size())], ready.back());
  Thread& t = *ready.back();
  ready.pop_back();
  if (!t.stack) {
    t.stack = take_stack();
    // Stacks are page-aligned: stagger them, or all hot lines fall into one set of the cache.
    auto top = reinterpret_cast<void**>(t.stack + STACK - 256 - t.rank % 64 * 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber);
    t.stack_pointer = reinterpret_cast<char*>(top - 6);
    std::fill(top - 6, top, nullptr);
  }
  current = &t;
  host::index.thread = t.index;
  host::index.block = t.block->index;
  return t;
}

// To another thread of the block if one can go on, and now and then to another block.
void give_way() {
  Thread& t = *current;
  auto& ready = t.block->ready;
  progress |= t.state != PAUSED;
  if (t.state == DONE || ready.empty() || (launch->order == RANDOM && below(64) == 0))
    return host_switch(&t.stack_pointer, scheduler_stack);
  Thread& next = take(ready);
  if (&next != &t) host_switch(&t.stack_pointer, next.stack_pointer);
}

// ---- messages
void say(const char* format, ...) {
  va_list args;
  va_start(args, format);
  const size_t used = strlen(launch->message);
  vsnprintf(launch->message + used, launch->message_size - used, format, args);
  va_end(args);
}

void say_who(const Thread& t) {
  const uint3 b = t.block->index;
  say("block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.index.x, t.index.y, t.index.z);
}

const char* name(const host::Site& s) {
  const char* slash = strrchr(s.file, '/');
  return slash ? slash + 1 : s.file;
}

bool same(const host::Site& a, const host::Site& b) {
  return a.line == b.line && strcmp(a.file, b.file) == 0;
}

void say_where_all_stand() {
  static const char* const doing[] = {"not waiting", "in __syncthreads", "in a warp operation",
                                      "in a spin loop"};
  for (size_t i = 0; i < resident.size() && i < 4; ++i) {
    const Block& b = *resident[i];
    std::map<std::tuple<State, std::string, int>, int> groups;
    for (auto& t : b.threads)
      if (t.state == AT_BARRIER || t.state == AT_WARP)
        ++groups[{t.state, name(t.site), t.site.line}];
      else if (t.state != DONE)
        ++groups[{t.state, "", 0}];
    say("\n  block (%u, %u, %u): %zu threads have returned", b.index.x, b.index.y, b.index.z,
        b.threads.size() - b.live);
    for (auto& [at, n] : groups) {
      say("\n    %d %s", n, doing[std::get<0>(at)]);
      if (std::get<2>(at)) say(" at %s:%d", std::get<1>(at).c_str(), std::get<2>(at));
    }
  }
}

// ---- blocks
void find_module() {
  struct Search { uintptr_t inside; } search{reinterpret_cast<uintptr_t>(launch->kernel)};
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* data) {
    const uintptr_t inside = static_cast<Search*>(data)->inside;
    uintptr_t end = 0;
    bool mine = false;
    size_t tls = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      auto& p = info->dlpi_phdr[i];
      const uintptr_t at = info->dlpi_addr + p.p_vaddr;
      if (p.p_type == PT_LOAD) {
        end = std::max(end, at + p.p_memsz);
        mine |= inside >= at && inside < at + p.p_memsz;
      } else if (p.p_type == PT_TLS) tls = p.p_memsz;
    }
    if (!mine) return 0;
    code_lo = reinterpret_cast<char*>(info->dlpi_addr);
    code_hi = reinterpret_cast<char*>(end);
    static_lo = static_cast<char*>(info->dlpi_tls_data);
    static_hi = static_lo + tls;
    return 1;
  }, &search);
}

void load(Block& b) {
  if (loaded == &b) return;
  const size_t fixed = static_hi - static_lo, dynamic = launch->shared;
  if (loaded) {
    loaded->image.assign(static_lo, static_hi);
    loaded->image.insert(loaded->image.end(), host::dynamic_shared, host::dynamic_shared + dynamic);
  }
  if (b.image.empty()) b.image.assign(fixed + dynamic, char(POISON));
  memcpy(static_lo, b.image.data(), fixed);
  memcpy(host::dynamic_shared, b.image.data() + fixed, dynamic);
  loaded = &b;
}

void admit(uint32_t id) {
  auto b = std::make_unique<Block>();
  const uint32_t *g = launch->grid, *n = launch->block;
  b->id = id;
  b->index = {id % g[0], id / g[0] % g[1], id / g[0] / g[1]};
  b->threads.resize(n[0] * n[1] * n[2]);
  b->live = b->threads.size();
  b->warps.resize((b->live + 31) / 32);
  for (uint32_t i = 0; i < b->live; ++i) {
    Thread& t = b->threads[i];
    t.block = b.get();
    t.rank = i;
    t.id = id * b->live + i;
    t.index = {i % n[0], i / n[0] % n[1], i / n[0] / n[1]};
    b->warps[i / 32].lanes |= 1u << i % 32;
  }
  make_all_ready(b->threads.data(), b->live);
  resident.push_back(std::move(b));
}

// Runs a block until none of its threads can go on, or for a while; says whether any did more than
// poll.
bool run(Block& b) {
  load(b);
  progress = false;
  while (!b.ready.empty()) {
    host_switch(&scheduler_stack, take(b.ready).stack_pointer);
    Thread& last = *current;
    current = nullptr;
    if (last.state != DONE) break;
    stacks.push_back(last.stack);
    last.stack = nullptr;
  }
  b.ready.insert(b.ready.end(), b.paused.begin(), b.paused.end());
  b.paused.clear();
  return progress;
}

void run_grid() {
  const uint32_t total = launch->grid[0] * launch->grid[1] * launch->grid[2];
  const uint32_t limit = launch->resident;
  if (launch->cooperative && total > limit)
    fault("launch", "a cooperative grid of %u blocks, of which %u can be resident", total, limit);
  std::vector<uint32_t> ids(total);
  for (uint32_t i = 0; i < total; ++i) ids[i] = launch->order == DESCENDING ? total - 1 - i : i;
  if (launch->order == RANDOM) std::shuffle(ids.begin(), ids.end(), generator);

  // Blocks run one after the other unless they wait for each other, a few at once in random order.
  const uint32_t threads = launch->block[0] * launch->block[1] * launch->block[2];
  const size_t several = launch->order == RANDOM ? 1 + 2048 / threads : 1;
  const size_t eager = launch->cooperative ? total : several;
  size_t next = 0, turn = 0, idle = 0;
  while (next < total || !resident.empty()) {
    while (next < total && resident.size() < limit &&
           (resident.size() < eager || idle > resident.size())) {
      admit(ids[next++]);
      idle = 0;
    }
    turn = launch->order == RANDOM ? below(resident.size()) : turn % resident.size();
    Block& b = *resident[turn];
    if (run(b)) idle = 0;
    else if (++idle > 10000) {                        // polls in vain, or none can even poll
      say("deadlock\nno thread can go on (%zu blocks resident, %zu not started)", resident.size(),
          total - next);
      say_where_all_stand();
      siglongjmp(failed, 1);
    }
    if (b.live) ++turn;
    else {
      loaded = nullptr;
      resident.erase(resident.begin() + turn);
      idle = 0;
    }
  }
}

// ---- barriers and warp operations
void resolve(Block& b, uint32_t warp, uint32_t lanes) {
  Thread* lane = &b.threads[warp * 32];
  uint64_t values[32], ballot = 0;
  for (uint32_t i = 0; i < 32; ++i)
    if (lanes >> i & 1) {
      values[i] = lane[i].value;
      ballot |= (lane[i].value & 1) << i;
    }
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    Thread& t = lane[i];
    const int first = i & -t.width, last = first + t.width - 1;
    int from = i;
    switch (t.op) {
      case host::LANE: from = first + (t.arg & (t.width - 1)); break;
      case host::UP: from = i - t.arg < first ? i : i - t.arg; break;
      case host::DOWN: from = i + t.arg > last ? i : i + t.arg; break;
      case host::XOR: from = (i ^ t.arg) > last ? i : i ^ t.arg; break;
      case host::SYNC: case host::BALLOT: break;
    }
    if (!(lanes >> from & 1)) {
      current = &t;
      fault("divergent warp", "reads lane %d, which takes no part in the shuffle at %s:%d", from,
            name(t.site), t.site.line);
    }
    t.value = t.op == host::BALLOT ? ballot : values[from];
  }
  make_all_ready(lane, std::min<size_t>(32, b.threads.size() - warp * 32), lanes);
  if (launch->check && lane[__builtin_ctz(lanes)].op == host::SYNC) note_warp(b, warp, lanes);
}

// Lets the lanes that a warp operation of t waits for go on, once all have come.
void meet(Thread& t) {
  Block& b = *t.block;
  Warp& w = b.warps[t.rank / 32];
  const Thread* lane = &t - t.rank % 32;
  const uint32_t lanes = t.mask & w.lanes;
  if (lanes & w.returned) {
    current = &t;
    fault("divergent warp", "waits in a warp operation at %s:%d with mask %08x, but lanes %08x "
          "have returned", name(t.site), t.site.line, t.mask, w.returned);
  }
  if (lanes & ~w.waiting) return;
  for (int i = 0; i < 32; ++i) {
    const Thread& o = lane[i];
    if (lanes >> i & 1 && (o.mask != t.mask || o.op != t.op || !same(o.site, t.site)))
      fault("divergent warp", "is in a warp operation at %s:%d with mask %08x, lane %d in one at "
            "%s:%d with mask %08x", name(t.site), t.site.line, t.mask, i, name(o.site), o.site.line,
            o.mask);
  }
  w.waiting &= ~lanes;
  resolve(b, t.rank / 32, lanes);
}

void finish(Thread& t) {
  Block& b = *t.block;
  t.state = DONE;
  --b.live;
  if (b.arrived)
    fault("divergent barrier", "returns while %u threads wait in __syncthreads at %s:%d", b.arrived,
          name(b.barrier), b.barrier.line);
  Warp& w = b.warps[t.rank / 32];
  w.returned |= 1u << t.rank % 32;
  for (uint32_t i = 0; i < 32; ++i)
    if (w.waiting >> i & 1) meet(b.threads[t.rank / 32 * 32 + i]);
}

// ---- faults of the machine
void timer(long seconds, long microseconds) {     // of this process's own time
  const itimerval t{{0, 0}, {seconds, microseconds}};
  setitimer(ITIMER_VIRTUAL, &t, nullptr);
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (signal == SIGVTALRM && !pthread_equal(pthread_self(), runner)) {
    pthread_kill(runner, signal);
    return;
  }
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto pc = reinterpret_cast<char*>(registers[REG_RIP]) + 1;
  if (signal == SIGVTALRM && (pc < code_lo || pc >= code_hi)) {   // amidst the runtime's own work
    timer(0, 10000);
    return;
  }
  if (!current) fault("emulator", "signal %d outside a kernel%s", signal, place(pc).text);
  if (signal == SIGVTALRM)
    fault("timeout", "still runs after %u s%s", launch->seconds, place(pc).text);
  if (signal == SIGFPE) fault("undefined behaviour", "integer division by zero%s", place(pc).text);
  if (signal == SIGILL || signal == SIGTRAP) fault("trap", "__trap()%s", place(pc).text);
  auto at = static_cast<char*>(info->si_addr);
  if (at >= current->stack && at < current->stack + PAGE)
    fault("stack overflow", "more than %zu KiB of locals%s", STACK >> 10, place(pc).text);
  for (uint32_t i = 0; i < launch->ranges_count; ++i) {
    const Range& r = launch->ranges[i];
    if (at >= r.hi && at < r.hi + PAGE)
      fault("out of bounds", "touches %zd bytes past the end of argument %d (%zd bytes)%s",
            at - r.hi, r.arg, r.hi - r.lo, place(pc).text);
  }
  fault("out of bounds", "touches address %p%s", at, place(pc).text);
}

// Installs the handlers for as long as it lives.
class Handlers {
  static constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};
  struct sigaction old[6];
  stack_t old_stack;
  std::vector<char> stack = std::vector<char>(64 << 10);

 public:
  Handlers() {
    stack_t mine{};
    mine.ss_sp = stack.data();
    mine.ss_size = stack.size();
    sigaltstack(&mine, &old_stack);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 6; ++i) sigaction(signals[i], &action, &old[i]);
    timer(launch->seconds, 0);
  }
  ~Handlers() {
    timer(0, 0);
    for (int i = 0; i < 6; ++i) sigaction(signals[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};
}  // namespace

void fault(const char* kind, const char* text, ...) {
  say("%s\n", kind);
  if (current) {
    say_who(*current);
    say(": ");
  }
  const size_t used = strlen(launch->message);
  va_list args;
  va_start(args, text);
  vsnprintf(launch->message + used, launch->message_size - used, text, args);
  va_end(args);
  siglongjmp(failed, 1);
}

Text place(const void* pc) {
  Text p{};
  Dl_info in;
  if (pc && dladdr(pc, &in) && in.dli_fname)
    snprintf(p.text, sizeof p.text, " at [%s+0x%zx]", in.dli_fname,
             static_cast<const char*>(pc) - static_cast<char*>(in.dli_fbase) - 1);
  return p;
}

void preempt() {
  if (launch->order != RANDOM || below(4)) return;
  make_ready(*current);
  give_way();
}

namespace host {
int barrier(int predicate, Site site) {
  Thread& t = *current;
  Block& b = *t.block;
  if (b.live < b.threads.size())
    fault("divergent barrier", "waits in __syncthreads at %s:%d, but %zu threads of the block have "
          "returned", name(site), site.line, b.threads.size() - b.live);
  if (!b.arrived) b.barrier = site;
  if (!same(b.barrier, site))
    fault("divergent barrier", "is in __syncthreads at %s:%d, %u other threads at %s:%d",
          name(site), site.line, b.arrived, name(b.barrier), b.barrier.line);
  t.site = site;
  t.state = AT_BARRIER;
  b.predicates += predicate;
  if (++b.arrived == b.live) {
    b.result = b.predicates;
    b.arrived = b.predicates = 0;
    if (launch->check) note_barrier(b);
    make_all_ready(b.threads.data(), b.live);
  }
  give_way();
  return b.result;
}

unsigned long warp(Shuffle op, unsigned mask, unsigned long value, int arg, int width, Site site) {
  Thread& t = *current;
  if (!(mask >> t.rank % 32 & 1))
    fault("divergent warp", "is not in the mask %08x of its own warp operation at %s:%d", mask,
          name(site), site.line);
  t.op = op;
  t.mask = mask;
  t.value = value;
  t.arg = arg;
  t.width = width;
  t.site = site;
  t.state = AT_WARP;
  t.block->warps[t.rank / 32].waiting |= 1u << t.rank % 32;
  meet(t);
  give_way();
  return t.value;
}

void fence() {
  if (launch->check) note_fence(*current);
  preempt();
}

void pause() {
  current->state = PAUSED;
  current->block->paused.push_back(current);
  give_way();
}

void atomic(void* address, int size, void* pc) {
  preempt();
  access(static_cast<char*>(address), size, ATOMIC, pc);
}
}  // namespace host

extern "C" {
int host_run(Launch* l) {
  launch = l;
  runner = pthread_self();
  generator.seed(l->seed);
  host::index.block_dim = {l->block[0], l->block[1], l->block[2]};
  host::index.grid_dim = {l->grid[0], l->grid[1], l->grid[2]};
  find_module();
  if (l->check) start_checking();
  const unsigned control = _mm_getcsr();
  int result;
  {
    Handlers installed;
    if (l->ftz) _mm_setcsr(control | 0x8040);       // flush denormal results, read them as zero
    result = sigsetjmp(failed, 1);
    if (result == 0) run_grid();
    _mm_setcsr(control);
  }
  for (auto& b : resident)
    for (auto& t : b->threads)
      if (t.stack) stacks.push_back(t.stack);
  resident.clear();
  loaded = nullptr;
  current = nullptr;
  return result;
}

static size_t whole_pages(size_t n) { return (n + PAGE - 1) / PAGE * PAGE; }

// Memory of whole 16-byte units, which ends where readable memory does.
void* host_allocate(size_t bytes) {
  const size_t size = whole_pages(bytes);
  void* m = mmap(nullptr, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED) return nullptr;
  mprotect(static_cast<char*>(m) + size, PAGE, PROT_NONE);
  return static_cast<char*>(m) + size - (bytes + 15) / 16 * 16;
}
void host_free(void* p, size_t bytes) {
  const size_t size = whole_pages(bytes);
  char* end = static_cast<char*>(p) + (bytes + 15) / 16 * 16;
  munmap(end - size, size + PAGE);
}
}
