// Checks every access of a module compiled with -fsanitize=thread: g++ calls the functions below
// before each load and store, and they are ours instead of the sanitizer's.
//
// Two accesses to one cell of memory, of which one writes and not both are strong (atomic or
// volatile), must be ordered: by a barrier within a block, by __syncwarp within a warp, or, between
// any two threads, by
//   the one access; __threadfence; strong write of X
//     -> strong read of X that sees it; __threadfence; the other access.
// Shuffles order nothing, and a fence counts for the strong accesses of its own thread only.
#include <algorithm>
#include <cstdio>

#include "runtime.h"

namespace {
struct Location { Clock released; uint32_t turn = 0; };
std::map<char*, Location> locations;                // cells that strong accesses touched
std::vector<std::vector<Cell>> global_cells;        // of each range

bool ordered(const Stamp& a, const Thread& t, char* at) {
  if (!a.pc || a.thread == t.id) return true;
  const uint32_t block = a.thread / t.block->threads.size();
  if (block == t.block->id && a.epoch < t.block->epoch) return true;
  return t.known.get(Clock::key(Clock::BLOCK, block)) > a.epoch ||
         t.known.get(Clock::key(Clock::THREAD, a.thread)) > a.now ||
         (a.turn && t.known.get(Clock::key(Clock::LOCATION, uint64_t(at))) >= a.turn);
}

Text name(const Range& r, const char* p) {
  Text n;
  if (r.arg >= 0) snprintf(n.text, sizeof n.text, "byte %zd of argument %d", p - r.lo, r.arg);
  else snprintf(n.text, sizeof n.text, "byte %zd of %s shared memory", p - r.lo,
                r.arg == Range::STATIC ? "static" : "dynamic");
  return n;
}

void race(const Stamp& a, const char* did, bool writes, const Range& r, char* at, void* pc) {
  const uint32_t n = current->block->threads.size(), block = a.thread / n, rank = a.thread % n;
  const uint32_t *g = launch->grid, *b = launch->block;
  fault("data race", "%s %s%s, which block (%u, %u, %u) thread (%u, %u, %u) %s%s, in no order",
        writes ? "writes" : "reads", name(r, at).text, place(pc).text, block % g[0],
        block / g[0] % g[1], block / g[0] / g[1], rank % b[0], rank / b[0] % b[1],
        rank / b[0] / b[1], did, place(a.pc).text);
}

bool poisoned(const char* p, uint32_t n) {
  for (uint32_t i = 0; i < n; ++i)
    if (uint8_t(p[i]) != POISON) return false;
  return true;
}

using Cells = std::vector<Cell>;

void visit(const Range& r, Cells& cells, char* p, int size, host::Access how, void* pc) {
  Thread& t = *current;
  const bool strong = how >= host::ATOMIC;
  const bool reads = how != host::WRITE && how != host::VOLATILE_WRITE;
  const bool writes = how != host::READ && how != host::VOLATILE_READ;
  if (writes && !r.writable)
    fault("write to const", "writes %s, which the kernel takes as const%s", name(r, p).text,
          place(pc).text);
  if (!r.writable && !r.fresh) return;               // nobody writes here
  if (cells.empty()) cells.resize((r.hi - r.lo + r.cell - 1) / r.cell);
  for (uint32_t i = (p - r.lo) / r.cell; i <= (p + size - 1 - r.lo) / r.cell; ++i) {
    Cell& c = cells[i];
    char* at = r.lo + size_t(i) * r.cell;
    if (reads && !c.write.pc && r.fresh && poisoned(at, std::min<size_t>(r.cell, r.hi - at)))
      fault("uninitialised read", "reads %s before it is written%s", name(r, at).text,
            place(pc).text);
    auto unordered = [&](const Stamp& a) { return !(strong && a.turn) && !ordered(a, t, at); };
    if (unordered(c.write)) race(c.write, "wrote", writes, r, at, pc);
    if (writes && unordered(c.first_read)) race(c.first_read, "read", true, r, at, pc);
    if (writes && unordered(c.last_read)) race(c.last_read, "read", true, r, at, pc);

    Stamp me{t.id, t.now, t.block->epoch, 0, pc};
    if (strong) {
      Location& x = locations[at];
      me.turn = ++x.turn;
      t.known.set(Clock::key(Clock::LOCATION, uint64_t(at)), me.turn);
      if (reads) t.observed.join(x.released);
      if (how == host::ATOMIC) x.released.join(t.released);
      if (how == host::VOLATILE_WRITE) x.released = t.released;
    }
    if (writes) c = {me, {}, {}};
    else if (ordered(c.first_read, t, at)) c.first_read = me;
    else c.last_read = me;
  }
}
}  // namespace

void start_checking() {
  locations.clear();
  global_cells.assign(launch->ranges_count, {});
}

void note_fence(Thread& t) {
  t.known.join(t.observed);
  t.observed = {};
  t.released = t.known;
  t.released.set(Clock::key(Clock::BLOCK, t.block->id), t.block->epoch);
  t.released.set(Clock::key(Clock::THREAD, t.id), ++t.now);
}

void note_barrier(Block& b) {
  Clock all;
  for (auto& t : b.threads) all.join(t.known);
  const uint64_t first = b.threads.front().id;
  all.forget_threads(first, first + b.threads.size());      // the new epoch says it for all of them
  for (auto& t : b.threads) t.known = all;
  ++b.epoch;
}

void note_warp(Block& b, uint32_t warp, uint32_t lanes) {
  Thread* lane = &b.threads[warp * 32];
  Clock all;
  for (int i = 0; i < 32; ++i)
    if (lanes >> i & 1) all.join(lane[i].known);
  for (int i = 0; i < 32; ++i)
    if (lanes >> i & 1) all.set(Clock::key(Clock::THREAD, lane[i].id), ++lane[i].now);
  for (int i = 0; i < 32; ++i)
    if (lanes >> i & 1) lane[i].known = all;
}

void access(char* p, int size, host::Access how, void* pc) {
  if (!launch->check) return;
  Thread& t = *current;
  Block& b = *t.block;
  auto index = reinterpret_cast<char*>(&host::index);
  if (p >= t.stack && p < t.stack + STACK) return;
  if (p >= index && p < index + sizeof host::index) return;
  char* const shared = host::dynamic_shared;
  const Range dynamic{shared, shared + launch->shared, 2, true, true, Range::DYNAMIC};
  const Range fixed{static_lo, static_hi, 2, true, true, Range::STATIC};
  if (dynamic.holds(p, size)) return visit(dynamic, b.dynamic_cells, p, size, how, pc);
  if (fixed.holds(p, size)) return visit(fixed, b.static_cells, p, size, how, pc);
  for (uint32_t i = 0; i < launch->ranges_count; ++i)
    if (launch->ranges[i].holds(p, size))
      return visit(launch->ranges[i], global_cells[i], p, size, how, pc);
  if (p >= code_lo && p < code_hi) return;           // the module's own constants
  const char* did = how == host::READ || how == host::VOLATILE_READ ? "reads" : "writes";
  if (p >= shared && p < shared + host::MAX_SHARED)
    fault("out of bounds", "%s %d bytes at offset %zd of %u bytes of dynamic shared memory%s", did,
          size, p - shared, launch->shared, place(pc).text);
  for (uint32_t i = 0; i < launch->ranges_count; ++i) {
    const Range& r = launch->ranges[i];
    if (p > r.lo - PAGE && p < r.hi + PAGE)
      fault("out of bounds", "%s %d bytes at offset %zd of argument %d (%zd bytes)%s", did, size,
            p - r.lo, r.arg, r.hi - r.lo, place(pc).text);
  }
  fault("out of bounds", "%s %d bytes at %p%s", did, size, p, place(pc).text);
}

// ---- what g++ calls
#define HERE __builtin_return_address(0)
#define HOOK(n, name, how) \
  void __tsan_##name##n(char* p) { access(p, n, host::how, HERE); }
#define HOOKS(n)                                                \
  HOOK(n, read, READ) HOOK(n, write, WRITE)                     \
  HOOK(n, unaligned_read, READ) HOOK(n, unaligned_write, WRITE) \
  HOOK(n, volatile_read, VOLATILE_READ) HOOK(n, volatile_write, VOLATILE_WRITE)
#define UNDEFINED(name, what)                                        \
  void __ubsan_handle_##name(void*) {                                \
    fault("undefined behaviour", "%s%s", what, place(HERE).text);    \
  }
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(char* p, size_t n) { access(p, n, host::READ, HERE); }
void __tsan_write_range(char* p, size_t n) { access(p, n, host::WRITE, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
UNDEFINED(add_overflow, "signed overflow in +")
UNDEFINED(sub_overflow, "signed overflow in -")
UNDEFINED(mul_overflow, "signed overflow in *")
UNDEFINED(negate_overflow, "signed overflow in -")
UNDEFINED(divrem_overflow, "division by zero or overflow in /")
UNDEFINED(shift_out_of_bounds, "shift by more than the width")
UNDEFINED(float_cast_overflow, "a float that the integer cannot hold")
void __ubsan_handle_out_of_bounds(void*) {
  fault("out of bounds", "array index%s", place(HERE).text);
}
void __ubsan_handle_type_mismatch_v1(void*, void* p) {
  fault(p ? "misaligned" : "out of bounds", "address %p%s", p, place(HERE).text);
}
}
