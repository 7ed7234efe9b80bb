// The state of a launch: threads, blocks, and what the access checker knows about them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "host.h"

// What a thread knows to have happened, as a sparse vector clock. Copies share their entries.
class Clock {
  using Entries = std::map<uint64_t, uint32_t>;
  std::shared_ptr<const Entries> entries;

 public:
  enum Of : uint64_t { BLOCK = 1, THREAD = 2, LOCATION = 3 };
  static uint64_t key(Of what, uint64_t id) { return uint64_t(what) << 60 | id; }
  uint32_t get(uint64_t k) const {
    if (!entries) return 0;
    auto e = entries->find(k);
    return e == entries->end() ? 0 : e->second;
  }
  void set(uint64_t k, uint32_t v) {
    auto next = std::make_shared<Entries>(entries ? *entries : Entries());
    (*next)[k] = v;
    entries = next;
  }
  void join(const Clock& o) {
    if (!o.entries || o.entries == entries) return;
    if (!entries) return void(entries = o.entries);
    auto next = std::make_shared<Entries>(*entries);
    for (auto [k, v] : *o.entries) {
      auto& mine = (*next)[k];
      if (mine < v) mine = v;
    }
    entries = next;
  }
  void forget_threads(uint64_t first, uint64_t end) {
    if (!entries) return;
    auto next = std::make_shared<Entries>(*entries);
    next->erase(next->lower_bound(key(THREAD, first)), next->lower_bound(key(THREAD, end)));
    entries = next;
  }
};

// One access, as later ones remember it: by whom, when, and from where.
struct Stamp {
  uint32_t thread = 0, now = 0, epoch = 0;
  uint32_t turn = 0;                      // its number among the strong accesses of the cell, or 0
  void* pc = nullptr;                     // null: no access
};
struct Cell { Stamp write, first_read, last_read; };

enum State : uint8_t { READY, AT_BARRIER, AT_WARP, PAUSED, DONE };

struct Block;
struct Thread {
  uint3 index{};
  uint32_t id = 0, rank = 0;              // in the grid, in the block
  Block* block = nullptr;
  char *stack = nullptr, *stack_pointer = nullptr;
  State state = READY;
  host::Site site;                        // of the barrier or warp operation it waits in
  host::Shuffle op{};
  uint32_t mask = 0;
  uint64_t value = 0;
  int arg = 0, width = 32;
  uint32_t now = 0;                       // counts the synchronisations it took part in
  Clock known, observed, released;        // for sure; after its next fence; before its last fence
};

struct Warp { uint32_t lanes = 0, returned = 0, waiting = 0; };    // masks

struct Block {
  uint3 index{};
  uint32_t id = 0, live = 0, arrived = 0, predicates = 0, result = 0;
  uint32_t epoch = 1;                     // counts barriers
  host::Site barrier;                     // where those that arrived wait
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready, paused;
  std::vector<char> image;                // shared memory while another block is loaded
  std::vector<Cell> static_cells, dynamic_cells;
};

// A piece of memory: of an argument, or shared.
struct Range {
  char *lo, *hi;
  uint32_t cell;                          // bytes
  uint32_t writable, fresh;               // fresh: poisoned, then written by kernels only
  int32_t arg;                            // or one of:
  enum : int32_t { STATIC = -1, DYNAMIC = -2 };
  bool holds(const char* p, int size) const { return p >= lo && p + size <= hi; }
};

enum Order : uint32_t { ASCENDING, DESCENDING, RANDOM };

struct Launch {                           // mirrored in device.py
  uint32_t grid[3], block[3], shared, cooperative, check, order, resident, ftz, seconds;
  uint32_t ranges_count;
  uint64_t seed;
  const host::Kernel* kernel;
  void** args;
  Range* ranges;
  char* message;
  uint32_t message_size;
};

constexpr size_t STACK = 128 << 10, PAGE = 4096;
constexpr unsigned POISON = 0xff;         // a NaN in every floating-point type

extern Launch* launch;
extern Thread* current;
extern char *static_lo, *static_hi;       // the loaded block's static shared memory
extern char *code_lo, *code_hi;           // the module's code and constants

[[noreturn]] __attribute__((format(printf, 2, 3)))
void fault(const char* kind, const char* text, ...);
struct Text { char text[512]; };
Text place(const void* pc);              // " at [file+offset]", which device.py makes file:line
void access(char* p, int size, host::Access how, void* pc);
void preempt();                           // in random order, perhaps let others run first

void start_checking();
void note_fence(Thread&);
void note_barrier(Block&);
void note_warp(Block&, uint32_t warp, uint32_t lanes);
