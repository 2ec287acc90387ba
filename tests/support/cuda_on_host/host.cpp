// The scheduler of cuda_runtime.h: fibers of one cluster at a time, on one CPU thread.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace host {
namespace {

constexpr size_t stack_bytes = 48 << 10;
constexpr size_t guard = 64;  // bytes behind shared memory that must stay as they are

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool committed;
};

struct Fiber {
  Thread thread;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  ucontext_t start;
  jmp_buf at;
  bool begun = false, done = false;
  int64_t* waits = nullptr;  // a barrier's count of completions, until it passes `seen`
  int64_t seen = 0;
  uint64_t given[2] = {};  // to the other lanes: at this exchange and at the one before
  unsigned turn = 0;
  int64_t cluster_seen = 0;
  bool arrived = false;
  std::vector<Copy> copies;
};

struct Barrier {
  unsigned size = 0, count = 0;
  int64_t completed = 0;
  void arrive() {
    if (++count == size) count = 0, completed++;
  }
};

struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps, blocks;
  Barrier whole;
  std::vector<std::vector<char>> shared;
  unsigned threads = 0;
};

thread_local Cluster* cluster = nullptr;
thread_local Fiber* fiber = nullptr;
thread_local const std::function<void()>* body = nullptr;
thread_local jmp_buf scheduler;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "cuda_on_host: %s\n", what);
  abort();
}

// A fiber outlives the kernel, ready for the next one: starting it takes system calls.
void run_fiber() {
  for (;;) {
    (*body)();
    if (fiber->arrived) fail("a thread ended between arriving at the cluster's barrier and waiting");
    if (!fiber->copies.empty()) fail("a thread ended before its copies");
    fiber->done = true;
    if (!setjmp(fiber->at)) longjmp(scheduler, 1);
  }
}

void pass(Barrier& barrier, int64_t seen) {
  fiber->waits = &barrier.completed;
  fiber->seen = seen;
  if (!setjmp(fiber->at)) longjmp(scheduler, 1);
}

void meet(Barrier& barrier) {
  int64_t seen = barrier.completed;
  barrier.arrive();
  pass(barrier, seen);
}

unsigned index() { return unsigned(fiber - cluster->fibers.data()); }

void resume(Fiber& next) {
  fiber = &next;
  self = &next.thread;
  if (setjmp(scheduler)) return;
  if (next.begun) longjmp(next.at, 1);
  next.begun = true;
  setcontext(&next.start);
}

void prepare(Cluster& c, unsigned first_block, unsigned size, unsigned threads, size_t bytes) {
  c.threads = threads;
  c.fibers.resize(size * threads);
  c.warps.assign(size * threads / 32, Barrier{32});
  c.blocks.assign(size, Barrier{threads});
  c.whole = Barrier{size * threads};
  c.shared.assign(size, std::vector<char>(bytes + guard, char(0xff)));
  for (unsigned i = 0; i < c.fibers.size(); i++) {
    Fiber& f = c.fibers[i];
    f.thread = {dim3(i % threads), dim3(first_block + i / threads), i / threads};
    f.done = false;
    f.waits = nullptr;
    if (f.begun) continue;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = stack_bytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, run_fiber, 0);
  }
}

// One warp after the other, each as far as it can go: what a fast warp can do before a slow one, it
// does. Lanes take turns within their warp.
void run_cluster(Cluster& c, std::vector<unsigned>& order, std::mt19937& random, int how) {
  for (size_t left = c.fibers.size(); left > 0;) {
    size_t before = left;
    bool moved = false;
    if (how > 1) std::shuffle(order.begin(), order.end(), random);
    for (unsigned warp : order) {
      for (bool again = true; again;) {
        again = false;
        for (unsigned lane = 0; lane < 32; lane++) {
          Fiber& f = c.fibers[warp * 32 + (how == 1 ? 31 - lane : lane)];
          if (f.done || (f.waits && *f.waits <= f.seen)) continue;
          again = moved = true;
          resume(f);
          left -= f.done;
        }
      }
    }
    if (!moved && left == before) fail("deadlock: not every thread reaches the barrier");
  }
}

}  // namespace

thread_local Thread* self = nullptr;

Device& device() {
  static Device it;
  return it;
}

void barrier(Scope scope) {
  unsigned i = index();
  if (scope == Scope::warp) return meet(cluster->warps[i / 32]);
  meet(scope == Scope::block ? cluster->blocks[i / cluster->threads] : cluster->whole);
}
void cluster_arrive() {
  if (fiber->arrived) fail("a thread arrived twice at the cluster's barrier");
  fiber->arrived = true;
  fiber->cluster_seen = cluster->whole.completed;
  cluster->whole.arrive();
}
void cluster_wait() {
  if (!fiber->arrived) fail("a thread waits for the cluster without having arrived");
  fiber->arrived = false;
  pass(cluster->whole, fiber->cluster_seen);
}
// One barrier per exchange: a lane that is at the next one writes to the other place.
const Fiber* give(uint64_t value) {
  fiber->given[fiber->turn ^= 1] = value;
  barrier(Scope::warp);
  return &cluster->fibers[index() / 32 * 32];
}
uint64_t exchange(uint64_t value, unsigned lane) {
  const Fiber* warp = give(value);
  return warp[lane].given[fiber->turn];
}
uint32_t ballot(bool yes) {
  const Fiber* warp = give(yes);
  uint32_t all = 0;
  for (unsigned k = 0; k < 32; k++) all |= uint32_t(warp[k].given[fiber->turn]) << k;
  return all;
}
char* shared_of(unsigned rank) {
  if (rank >= cluster->shared.size()) fail("no such block in the cluster");
  return cluster->shared[rank].data();
}

void copy_later(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("a misaligned asynchronous copy");
  }
  fiber->copies.push_back({to, from, bytes, false});
}
void commit_copies() {
  for (Copy& copy : fiber->copies) copy.committed = true;
}
void wait_for_copies() {
  for (const Copy& copy : fiber->copies) {
    if (copy.committed) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  std::erase_if(fiber->copies, [](const Copy& copy) { return copy.committed; });
}

int launch(dim3 grid, unsigned threads, unsigned size, size_t bytes,
           const std::function<void()>& kernel) {
  Device& d = device();
  if (grid.x % size || int64_t(bytes) > d.block_shared || size > 16) return 1;
  d.launches++, d.last_cluster = size, d.last_bytes = bytes;
  static thread_local Cluster it;
  cluster = &it;
  body = &kernel;
  std::mt19937 random(unsigned(d.order));
  std::vector<unsigned> order(size * threads / 32);
  std::iota(order.begin(), order.end(), 0u);
  if (d.order == 1) std::reverse(order.begin(), order.end());
  for (unsigned b = 0; b < grid.x; b += size) {
    prepare(it, b, size, threads, bytes);
    run_cluster(it, order, random, d.order);
    for (const auto& shared : it.shared) {
      for (size_t k = bytes; k < bytes + guard; k++) {
        if (shared[k] != char(0xff)) fail("a write beyond shared memory");
      }
    }
  }
  return 0;
}

}  // namespace host
