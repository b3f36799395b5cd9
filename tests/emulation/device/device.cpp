// Threads as fibres on one thread of the host. A warp that is ready is picked at random and its lanes run one after
// another, each until it waits: for its warp, its block, its cluster. Compiled without instrumentation.
#include "device.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "memory.h"

namespace emulation {

const Accessor* accessor = nullptr;
const void* launch_call = nullptr;
size_t launch_call_bytes = 0;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSteps = size_t{1} << 29;  // of a launch; a mutation may loop for ever

enum class State { kReady, kWarp, kBlock, kCluster, kDone };

struct Warp {
  alignas(16) unsigned char slots[2][kLanes * 64];
  unsigned first, lanes;  // of its threads in the cluster
  unsigned generation = 0, arrived = 0;
  const char* operation = nullptr;
};

struct Block {
  Index index;
  unsigned threads, arrived = 0, finished = 0;
  int line = 0;  // of the barrier that is waited for
};

struct Fibre {
  Accessor accessor;
  Index index;
  Block* block;
  Warp* warp;
  unsigned lane;
  State state = State::kReady;
  bool started = false, arrived_at_cluster = false;
  unsigned phase = 0;
  const char* waits_for = "";
  jmp_buf context;
  ucontext_t start;
};

// What runs now. One launch at a time, on the thread of the host that calls.
struct Launch {
  LaunchShape shape;
  void (*thread)(const void*);
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Fibre>> fibres;
  unsigned cluster_arrived = 0, cluster_phase = 0;
  size_t steps = 0;
  std::string fault;
};

Launch* launch = nullptr;
Fibre* current = nullptr;
jmp_buf scheduler;
std::mt19937 order;
int mutation = -1;

// Stacks with a page below that faults; kept from launch to launch.
char* stack_of(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    auto* const memory = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for the stacks of threads");
    mprotect(memory, 4096, PROT_NONE);
    stacks.push_back(memory);
  }
  return stacks[number];
}

void wait(State state, const char* what) {
  current->state = state;
  current->waits_for = what;
  count_step();
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void wake(Fibre& fibre, State from) {
  if (fibre.state == from) fibre.state = State::kReady;
}

void finish() {
  current->state = State::kDone;
  Block& block = *current->block;
  if (block.arrived > 0) fail("returns while others of its block wait at a barrier");
  if (current->arrived_at_cluster) fail("returns between arriving at a barrier of its cluster and waiting there");
  finish_copies();
  if (++block.finished == block.threads) end_of_block(current->accessor.block);
  _longjmp(scheduler, 1);
}

void enter() {
  launch->thread(launch_call);
  finish();
}

// A function of its own: its frame must not change between leaving and coming back.
[[gnu::noinline]] void resume(Fibre& fibre) {
  current = &fibre;
  accessor = &fibre.accessor;
  if (_setjmp(scheduler) == 0) {
    if (fibre.started) _longjmp(fibre.context, 1);
    fibre.started = true;
    setcontext(&fibre.start);
  }
  accessor = nullptr;
}

Fibre& make_fibre(unsigned number, unsigned in_block, Block& block, Warp& warp, unsigned block_number) {
  auto fibre = std::make_unique<Fibre>();
  const Index& size = launch->shape.block;
  fibre->index = {in_block % size.x, in_block / size.x % size.y, in_block / size.x / size.y};
  fibre->block = &block;
  fibre->warp = &warp;
  fibre->lane = in_block % kLanes;
  char* const stack = stack_of(number);
  fibre->accessor = {number, block_number, reinterpret_cast<uintptr_t>(stack), kStackBytes};
  getcontext(&fibre->start);
  fibre->start.uc_stack.ss_sp = stack + 4096;
  fibre->start.uc_stack.ss_size = kStackBytes - 4096;
  fibre->start.uc_link = nullptr;
  makecontext(&fibre->start, enter, 0);
  launch->fibres.push_back(std::move(fibre));
  return *launch->fibres.back();
}

void make_cluster(Index first) {
  const unsigned threads = static_cast<unsigned>(launch->shape.block.volume()), count = launch->shape.cluster;
  launch->fibres.clear();
  launch->warps.clear();
  launch->blocks.assign(count, Block{});
  launch->cluster_arrived = launch->cluster_phase = 0;
  begin_blocks(launch->shape.dynamic_shared);
  for (unsigned b = 0; b < count; ++b) {
    launch->blocks[b].index = {first.x + b, first.y, first.z};
    launch->blocks[b].threads = threads;
    for (unsigned t = 0; t < threads; ++t) {
      if (t % kLanes == 0) {
        launch->warps.push_back(std::make_unique<Warp>());
        launch->warps.back()->first = b * threads + t;
        launch->warps.back()->lanes = std::min(kLanes, threads - t);
      }
      make_fibre(b * threads + t, t, launch->blocks[b], *launch->warps.back(), b);
    }
  }
}

void describe_stuck() {
  for (const auto& fibre : launch->fibres) {
    if (fibre->state == State::kDone) continue;
    current = fibre.get();
    const std::string what = std::string("waits for ever: ") + fibre->waits_for + ", where not all come";
    accessor = nullptr;
    launch->fault = what;
    return;
  }
}

void run_cluster(Index first) {
  make_cluster(first);
  std::vector<Warp*> ready;
  while (launch->fault.empty()) {
    ready.clear();
    bool alive = false;
    for (const auto& warp : launch->warps) {
      bool runs = false;
      for (unsigned l = 0; l < warp->lanes; ++l) {
        const State state = launch->fibres[warp->first + l]->state;
        runs = runs || state == State::kReady;
        alive = alive || state != State::kDone;
      }
      if (runs) ready.push_back(warp.get());
    }
    if (!alive) return;
    if (ready.empty()) return describe_stuck();
    // All that are ready, in a random order, each a random number of turns.
    std::shuffle(ready.begin(), ready.end(), order);
    for (Warp* const warp : ready) {
      const unsigned turns = 1 + order() % 32, shift = order() % kLanes;
      for (unsigned turn = 0; turn < turns; ++turn) {
        bool ran = false;
        for (unsigned l = 0; l < warp->lanes && launch->fault.empty(); ++l) {
          Fibre& fibre = *launch->fibres[warp->first + (l + shift) % warp->lanes];
          if (fibre.state != State::kReady) continue;
          resume(fibre);
          ran = true;
        }
        if (!ran || !launch->fault.empty()) break;
      }
    }
  }
}

}  // namespace

void run(const LaunchShape& shape, const void* kernel, const void* call, size_t call_bytes,
         void (*thread)(const void*)) {
  check_shape(shape, kernel);
  Launch now;
  now.shape = shape;
  now.thread = thread;
  launch = &now;
  launch_call = call;
  launch_call_bytes = call_bytes;
  forget_places();
  const size_t clusters = shape.grid.volume() / shape.cluster, across = shape.grid.x / shape.cluster;
  std::vector<size_t> turns(clusters);
  for (size_t i = 0; i < clusters; ++i) turns[i] = i;
  std::shuffle(turns.begin(), turns.end(), order);
  for (const size_t turn : turns) {
    const size_t x = turn % across * shape.cluster, y = turn / across % shape.grid.y, z = turn / across / shape.grid.y;
    run_cluster({static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)});
    if (!now.fault.empty()) break;
  }
  launch = nullptr;
  if (now.fault.empty()) return;
  const Index block = current->block->index, index = current->index;
  char where[128];
  std::snprintf(where, sizeof(where), "emulated block (%u, %u, %u), thread (%u, %u, %u): ", block.x, block.y, block.z,
                index.x, index.y, index.z);
  throw std::runtime_error(where + now.fault);
}

Index thread_index() { return current->index; }
Index block_index() { return current->block->index; }
Index block_size() { return launch->shape.block; }
Index grid_size() { return launch->shape.grid; }

void fail_at(const char* what, const void* code) {
  accessor = nullptr;
  launch->fault = std::string(what) + (code == nullptr ? "" : " (" + place_of(code) + ")");
  _longjmp(scheduler, 1);
}

void fail(const char* what) { fail_at(what, nullptr); }

bool mutated(int number) { return mutation == number; }

void forget(void* variable, size_t bytes) { std::memset(variable, 0xfe, bytes); }

void count_step() {
  if (++launch->steps > kMaxSteps) fail("does not come to an end");
}

void block_barrier(int line) {
  Block& block = *current->block;
  if (block.finished > 0) fail("waits at a barrier that others of its block have returned before");
  if (block.arrived == 0) block.line = line;
  if (block.line != line) fail("waits at another barrier than others of its block");
  if (++block.arrived < block.threads) return wait(State::kBlock, "a barrier of its block");
  block.arrived = 0;
  next_interval(current->accessor.block);
  for (const auto& fibre : launch->fibres) {
    if (fibre->block == &block) wake(*fibre, State::kBlock);
  }
}

void cluster_arrive() {
  if (current->arrived_at_cluster) fail("arrives twice at a barrier of its cluster");
  current->arrived_at_cluster = true;
  current->phase = launch->cluster_phase;
  if (++launch->cluster_arrived < launch->fibres.size()) return;
  launch->cluster_arrived = 0;
  ++launch->cluster_phase;
  for (unsigned b = 0; b < launch->blocks.size(); ++b) next_interval(b);
  for (const auto& fibre : launch->fibres) wake(*fibre, State::kCluster);
}

void cluster_wait() {
  if (!current->arrived_at_cluster) fail("waits at a barrier of its cluster without arriving");
  current->arrived_at_cluster = false;
  if (current->phase == launch->cluster_phase) wait(State::kCluster, "a barrier of its cluster");
}

const unsigned char* exchange(const char* operation, const void* mine, size_t bytes) {
  Warp& warp = *current->warp;
  if (warp.lanes < kLanes) fail("a whole warp is wanted");
  if (warp.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0) fail("lanes of a warp have come to different operations");
  const unsigned generation = warp.generation;
  unsigned char* const slots = warp.slots[generation % 2];
  std::memcpy(slots + current->lane * 64, mine, bytes);
  if (++warp.arrived < kLanes) {
    wait(State::kWarp, operation);
    return slots;
  }
  warp.arrived = 0;
  ++warp.generation;
  for (unsigned l = 0; l < kLanes; ++l) wake(*launch->fibres[warp.first + l], State::kWarp);
  return slots;
}

void shuffle_xor(unsigned mask, void* value, size_t bytes, int lane_mask) {
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
  const unsigned char* const slots = exchange("a shuffle", value, bytes);
  const unsigned other = current->lane ^ static_cast<unsigned>(lane_mask);
  if (other < kLanes) std::memcpy(value, slots + other * 64, bytes);
}

}  // namespace emulation

extern "C" {

// The order of blocks and warps from here on.
void emulation_seed(unsigned seed) { emulation::order.seed(seed); }

// Switches a mutation on, where mutations are compiled in; -1 for none.
void emulation_mutate(int number) { emulation::mutation = number; }
}
