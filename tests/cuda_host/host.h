// What the kernels' side (cuda.h) and the runtime share.
#pragma once

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace host {
struct Index { uint3 thread, block; dim3 block_dim, grid_dim; };
extern Index index;                       // of the running thread

struct Site { const char* file = ""; int line = 0; };
enum Shuffle { SYNC, LANE, UP, DOWN, XOR, BALLOT };
enum Access { READ, WRITE, ATOMIC, VOLATILE_READ, VOLATILE_WRITE };

int barrier(int predicate, Site);         // the number of threads whose predicate holds
unsigned long warp(Shuffle, unsigned mask, unsigned long value, int arg, int width, Site);
void fence();
void pause();                             // a spinning thread gives way
void atomic(void* address, int size, void* pc);
constexpr unsigned MAX_SHARED = 227 << 10;
extern char dynamic_shared[MAX_SHARED];   // of the running block

struct Param { bool pointer, constant; char kind; int size; };    // of the element, if a pointer
struct Kernel { void (*call)(void** args); int count; const Param* params; };
}  // namespace host
