// Metal's names for C++, and eyes on every access.
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>
#include <ucontext.h>
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
struct uint3 { uint x, y, z; };
namespace host {
using std::string; using std::to_string;
struct Fault { string text; };
[[noreturn]] inline void fault(int line, const string& what) { throw Fault{"line " + to_string(line) + ": " + what}; }

// ---- a thread is a fiber: it has a stack of its own and runs until it must wait for others
enum Wait { nothing, at_barrier, at_simd };
struct Fiber {
    ucontext_t start; jmp_buf here; std::vector<char> stack;
    uint3 grid, local; uint index; bool begun, done; Wait wait; int line; uint ops, fences;
};
struct Slot { double v[4]; };                       // what a lane shows the others
struct Poisoned { virtual void poison() = 0; };
struct World {
    std::vector<Fiber> fibers; Fiber* now; jmp_buf scheduler; ucontext_t base;
    std::vector<Slot> slots; uint epoch; uint3 grid, threads, groups, group; ulong group_index;
    std::vector<Poisoned*> shared; size_t bytes; string error; void (*body)();
};
static World& world() { static World w; return w; }
inline Fiber& self() { return *world().now; }
inline void wait(Wait why, int line) {
    Fiber& f = self(); f.wait = why; f.line = line;
    if (!_setjmp(f.here)) _longjmp(world().scheduler, 1);
}
inline void entry() {
    World& w = world();
    try { w.body(); } catch (const Fault& e) { if (w.error.empty()) w.error = e.text; }
    self().done = true;
    _longjmp(w.scheduler, 1);
}
inline void resume(Fiber& f) {
    World& w = world(); w.now = &f; f.wait = nothing;
    if (_setjmp(w.scheduler)) return;
    if (f.begun) _longjmp(f.here, 1);
    f.begun = true;
    getcontext(&f.start); f.start.uc_stack.ss_sp = f.stack.data(); f.start.uc_stack.ss_size = f.stack.size(); f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0); setcontext(&f.start);
}
inline const Slot* exchange(const Slot& mine, int line) { // show a value, wait for the other 31, see theirs
    World& w = world(); Fiber& f = self();
    Slot* s = &w.slots[(f.ops & 1) * 1024 + f.index / 32 * 32];
    s[f.index % 32] = mine; f.ops++;
    wait(at_simd, line);
    return s;
}
inline bool release(size_t from, size_t to, Wait what) { // let threads go on if all of them wait at the same place
    auto& f = world().fibers;
    for (size_t t = from; t < to; t++) if (f[t].done || f[t].wait != what || f[t].line != f[from].line) return false;
    for (size_t t = from; t < to; t++) f[t].wait = nothing;
    return true;
}
inline string divergence() {
    string s; int shown = 0, last = -2;
    for (auto& f : world().fibers) {
        int at = f.done ? -1 : f.line;
        if (at == last || shown == 3) continue;
        last = at; shown++;
        s += (s.empty() ? "thread " : ", thread ") + to_string(f.index) + (f.done ? " has ended" : string(f.wait == at_simd ? " is in a SIMD function" : " waits at the barrier") + " of line " + to_string(f.line));
    }
    return "the threads of a group went different ways: " + s;
}
inline void run_group(size_t n) {
    World& w = world(); w.epoch = 0;
    for (auto* m : w.shared) m->poison();
    for (size_t t = 0; t < n; t++) { Fiber& f = w.fibers[t]; f.begun = f.done = false; f.ops = f.fences = 0; f.wait = nothing; }
    while (w.error.empty()) {
        size_t left = 0;
        for (size_t t = 0; t < n && w.error.empty(); t++) {
            Fiber& f = w.fibers[t];
            if (!f.done && f.wait == nothing) resume(f);
            left += !f.done;
        }
        if (!left || !w.error.empty()) return;
        bool moved = false;
        for (size_t g = 0; g < n; g += 32) {
            size_t end = g + 32 < n ? g + 32 : n;
            if (w.fibers[g].wait == at_simd && end - g < 32) { w.error = "line " + to_string(w.fibers[g].line) + ": a SIMD function in a group of " + to_string(n) + " threads, which is no multiple of 32"; return; }
            moved |= release(g, end, at_simd);
        }
        if (!moved && release(0, n, at_barrier)) { w.epoch++; moved = true; }
        if (!moved) w.error = divergence();
    }
}

// ---- memory that knows its bounds, and who wrote and read each element
struct At { long i; int line; At(long i, int line = __builtin_LINE()) : i(i), line(line) {} };
struct Touch { long group = -1; int writer = -1, reader = -1; uint wepoch, wfence, repoch, rfence; };
enum Space { device_, threadgroup_, thread_ };
template <class T> struct Memory : Poisoned {
    string name; Space space; bool writable; T* data; long n; std::vector<T> own; std::vector<Touch> touch;
    Memory() {}
    Memory(long n, const char* name, Space s) : name(name), space(s), writable(true), n(n), own(n) {
        data = own.data();
        if (s == threadgroup_) { world().shared.push_back(this); world().bytes += n * sizeof(T); touch.resize(n); }
        poison();
    }
    void poison() override { for (auto& t : touch) t = Touch(); if (!own.empty()) memset((void*)data, 0xff, n * sizeof(T)); } // NaN, or -1
    string what(long i) { return name + "[" + to_string(i) + "]"; }
    void bounds(const At& a) { if (a.i < 0 || a.i >= n) fault(a.line, what(a.i) + " is out of bounds: it has " + to_string(n) + " elements"); }
    bool apart(int other, uint epoch, uint fence) { // could both happen at once on a GPU?
        Fiber& f = self();
        return other >= 0 && other != (int)f.index && epoch == world().epoch && !(other / 32 == (int)f.index / 32 && fence != f.fences);
    }
    T read(const At& a) {
        bounds(a);
        if (touch.empty()) return data[a.i];
        Touch& t = touch[a.i];
        if (t.writer < 0) fault(a.line, what(a.i) + " is read before it was written");
        if (t.group != (long)world().group_index) fault(a.line, what(a.i) + " is read but another threadgroup wrote it");
        if (apart(t.writer, t.wepoch, t.wfence)) fault(a.line, what(a.i) + " is read by thread " + to_string(self().index) + " without a barrier after thread " + to_string(t.writer) + " wrote it");
        bool shared = t.reader >= 0 && t.reader != (int)self().index && t.repoch == world().epoch;
        t.reader = shared ? 1 << 20 : (int)self().index; t.repoch = world().epoch; t.rfence = self().fences;
        return data[a.i];
    }
    void write(const At& a, T v) {
        bounds(a);
        if (!writable) fault(a.line, name + " is an input and cannot be written");
        if (!touch.empty()) {
            Touch& t = touch[a.i];
            if (t.writer >= 0 && t.group != (long)world().group_index) fault(a.line, what(a.i) + " is written by two threadgroups");
            if (apart(t.writer, t.wepoch, t.wfence)) fault(a.line, what(a.i) + " is written by threads " + to_string(t.writer) + " and " + to_string(self().index) + " without a barrier between");
            if (apart(t.reader, t.repoch, t.rfence)) fault(a.line, what(a.i) + " is written by thread " + to_string(self().index) + " while another thread may still read it");
            t.group = world().group_index; t.writer = self().index; t.wepoch = world().epoch; t.wfence = self().fences;
        }
        data[a.i] = v;
    }
};
template <class T> struct Ref { // an element that was named but not yet read or written
    Memory<T>* m; At a;
    operator T() const { return m->read(a); }
    template <class U> explicit operator U() const { return static_cast<U>(m->read(a)); }
    const Ref& operator=(T v) const { m->write(a, v); return *this; }
    const Ref& operator=(const Ref& r) const { m->write(a, (T)r); return *this; }
    const Ref& operator+=(T v) const { m->write(a, m->read(a) + v); return *this; }
    const Ref& operator-=(T v) const { m->write(a, m->read(a) - v); return *this; }
    const Ref& operator*=(T v) const { m->write(a, m->read(a) * v); return *this; }
};
template <class T> struct Ptr { // a pointer that stays inside its memory
    Memory<T>* m; long at;
    Ref<T> operator[](const At& a) const { return Ref<T>{m, At(at + a.i, a.line)}; }
    Ptr operator+(long i) const { return Ptr{m, at + i}; }
};
template <class T> struct Shared : Memory<T> { Shared(long n, const char* name) : Memory<T>(n, name, threadgroup_) {} operator Ptr<T>() { return {this, 0}; }
    Ref<T> operator[](const At& a) { return Ref<T>{this, a}; } Ptr<T> operator+(long i) { return {this, i}; } };
template <class T, long N> struct Local : Memory<T> { Local(const char* name) : Memory<T>(N, name, thread_) {} Ref<T> operator[](const At& a) { return Ref<T>{this, a}; } };

template <class T> T pick(const Slot* s, uint lane) { return (T)s[lane].v[0]; }
template <class T, class F> T fold(T x, F f, int line) { // the butterfly of a GPU: the same order of additions
    for (uint step = 16; step; step /= 2) { const Slot* s = exchange(Slot{{(double)x}}, line); x = f(x, pick<T>(s, self().index % 32 ^ step)); }
    return x;
}
struct Arg { void* data; long n; int shape[8]; };
inline void launch(void (*body)(), uint* grid, uint* threads) { // threadgroups one after the other; those at the edge may be smaller
    World& w = world(); w.body = body; w.error.clear(); w.group_index = 0;
    w.grid = {grid[0], grid[1], grid[2]};
    w.threads = {threads[0] < grid[0] ? threads[0] : grid[0], threads[1] < grid[1] ? threads[1] : grid[1], threads[2] < grid[2] ? threads[2] : grid[2]};
    w.groups = {(grid[0] + w.threads.x - 1) / w.threads.x, (grid[1] + w.threads.y - 1) / w.threads.y, (grid[2] + w.threads.z - 1) / w.threads.z};
    w.fibers.resize(w.threads.x * w.threads.y * w.threads.z); w.slots.resize(2048);
    for (auto& f : w.fibers) f.stack.resize(1 << 16);
    for (uint z = 0; z < w.groups.z; z++) for (uint y = 0; y < w.groups.y; y++) for (uint x = 0; x < w.groups.x; x++) {
        w.group = {x, y, z}; size_t n = 0;
        for (uint k = 0; k < w.threads.z; k++) for (uint j = 0; j < w.threads.y; j++) for (uint i = 0; i < w.threads.x; i++) {
            uint3 g = {x * w.threads.x + i, y * w.threads.y + j, z * w.threads.z + k};
            if (g.x >= grid[0] || g.y >= grid[1] || g.z >= grid[2]) continue;
            Fiber& f = w.fibers[n]; f.grid = g; f.local = {i, j, k}; f.index = n++;
        }
        run_group(n);
        if (w.bytes > 32768 && w.error.empty()) w.error = "its " + to_string(w.bytes) + " bytes of threadgroup memory are more than the 32768 there are";
        if (!w.error.empty()) return;
        w.group_index++;
    }
}
template <class T> void all_written(Memory<T>& m) {
    if (!world().error.empty()) return;
    long missing = 0, first = -1;
    for (long i = 0; i < m.n; i++) if (m.touch[i].writer < 0 && missing++ == 0) first = i;
    if (missing) world().error = to_string(missing) + " of the " + to_string(m.n) + " elements of output " + m.name + " were never written, the first is " + m.what(first);
}
template <class T> void bind(Memory<T>& m, Arg& a, const char* name, bool output, int* shape) {
    m.name = name; m.space = device_; m.writable = output; m.data = (T*)a.data; m.n = a.n; m.touch.clear();
    if (output) { m.touch.resize(m.n); memset(a.data, 0xff, a.n * sizeof(T)); }
    memcpy(shape, a.shape, sizeof a.shape);
}
inline int report(char* error, int room) { strncpy(error, world().error.c_str(), room - 1); error[room - 1] = 0; return !world().error.empty(); }
}

// ---- Metal's words
#define device
#define constant
#define thread
#define LINE int line = __builtin_LINE()
#define thread_position_in_grid (host::self().grid)
#define thread_position_in_threadgroup (host::self().local)
#define threadgroup_position_in_grid (host::world().group)
#define threads_per_threadgroup (host::world().threads)
#define threadgroups_per_grid (host::world().groups)
#define threads_per_grid (host::world().grid)
#define thread_index_in_threadgroup (host::self().index)
#define thread_index_in_simdgroup (host::self().index % 32)
#define simdgroup_index_in_threadgroup (host::self().index / 32)
#define threads_per_simdgroup 32u

struct half { // stored in 16 bits, computed as float, converted only where the text says so
    uint16_t bits; half() = default;
    explicit half(float f) { _Float16 h = (_Float16)f; memcpy(&bits, &h, 2); }
    explicit operator float() const { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
};
struct bfloat16_t {
    uint16_t bits; bfloat16_t() = default;
    explicit bfloat16_t(float f) { uint32_t u; memcpy(&u, &f, 4); bits = f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16; }
    explicit operator float() const { uint32_t u = (uint32_t)bits << 16; float f; memcpy(&f, &u, 4); return f; }
};
typedef half float16_t;

namespace metal {
inline float exp(float x) { return std::exp(x); } inline float log(float x) { return std::log(x); } inline float tanh(float x) { return std::tanh(x); }
inline float sqrt(float x) { return std::sqrt(x); } inline float rsqrt(float x) { return 1 / std::sqrt(x); } inline float abs(float x) { return std::fabs(x); }
inline float max(float a, float b) { return a > b ? a : b; } inline float min(float a, float b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; } inline uint min(uint a, uint b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; } inline int min(int a, int b) { return a < b ? a : b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags, LINE) { host::wait(host::at_barrier, line); }
inline void simdgroup_barrier(mem_flags, LINE) { host::exchange(host::Slot{}, line); host::self().fences++; }
inline float simd_sum(float x, LINE) { return host::fold(x, [](float a, float b) { return a + b; }, line); }
inline float simd_max(float x, LINE) { return host::fold(x, [](float a, float b) { return a > b ? a : b; }, line); }
template <class T> T simd_shuffle(T x, ushort lane, LINE) { return host::pick<T>(host::exchange(host::Slot{{(double)x}}, line), lane); }
template <class T> T simd_shuffle_xor(T x, ushort mask, LINE) { return host::pick<T>(host::exchange(host::Slot{{(double)x}}, line), host::self().index % 32 ^ mask); }
template <class T> T simd_broadcast(T x, ushort lane, LINE) { return simd_shuffle(x, lane, line); }
inline float simd_prefix_inclusive_sum(float x, LINE) {
    for (uint step = 1; step < 32; step *= 2) { const host::Slot* s = host::exchange(host::Slot{{x}}, line); uint lane = host::self().index % 32; if (lane >= step) x += host::pick<float>(s, lane - step); }
    return x;
}

// an 8 by 8 matrix of a SIMD group: two elements in each lane
struct simdgroup_float8x8 { float e[2]; float* thread_elements() { return e; } };
inline void place(uint lane, uint& r, uint& c) { uint q = lane / 4; r = (q & 4) + lane / 2 % 4; c = (q & 2) * 2 + lane % 2 * 2; }
template <class T, int R, int C> simdgroup_float8x8 make_filled_simdgroup_matrix(T x) { return {{x, x}}; }
template <class P> void simdgroup_load(simdgroup_float8x8& m, P p, ulong ld, int = 0, bool transpose = false, LINE) {
    uint r, c; place(host::self().index % 32, r, c);
    for (uint j = 0; j < 2; j++) m.e[j] = (float)p[host::At(transpose ? (c + j) * ld + r : r * ld + c + j, line)];
    host::exchange(host::Slot{}, line);
}
template <class P> void simdgroup_store(simdgroup_float8x8 m, P p, ulong ld, LINE) {
    uint r, c; place(host::self().index % 32, r, c);
    for (uint j = 0; j < 2; j++) p[host::At(r * ld + c + j, line)] = m.e[j];
    host::exchange(host::Slot{}, line);
}
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c, LINE) {
    const host::Slot* s = host::exchange(host::Slot{{a.e[0], a.e[1], b.e[0], b.e[1]}}, line);
    auto lane = [](uint r, uint c) { return ((r & 4) << 2) + ((r & 3) << 1) + ((c & 4) << 1) + ((c & 2) >> 1); };
    uint r, k; place(host::self().index % 32, r, k);
    for (uint j = 0; j < 2; j++) {
        float x = c.e[j];
        for (uint i = 0; i < 8; i++) x = std::fma((float)s[lane(r, i)].v[i % 2], (float)s[lane(i, k + j)].v[2 + (k + j) % 2], x);
        d.e[j] = x;
    }
}
inline void simdgroup_multiply(simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, LINE) { simdgroup_multiply_accumulate(d, a, b, simdgroup_float8x8{{0, 0}}, line); }
}
using namespace metal;
