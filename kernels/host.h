// Metal's names for C++, and eyes on every access.
#ifdef __APPLE__
#define _XOPEN_SOURCE 700 // a Mac's <ucontext.h> wants to be asked
#define _DARWIN_C_SOURCE
#endif
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#ifndef __clang__
#include <source_location>
#endif
#include <string>
#include <vector>
#include <ucontext.h>
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
struct uint3 { uint x, y, z; };

namespace host {
#ifdef __clang__
struct Here {
    int l, c;
    static constexpr Here current(int l = __builtin_LINE(), int c = __builtin_COLUMN()) { return {l, c}; }
    constexpr int line() const { return l; }
    constexpr int column() const { return c; }
};
#else
typedef std::source_location Here;
#endif
struct Site { // a call in the kernel, or a loop
    int line, column;
    constexpr Site(int line = 0, int column = 0) : line(line), column(column) {}
    constexpr Site(const Here& h) : line(h.line()), column(h.column()) {}
    bool operator==(const Site& s) const { return line == s.line && column == s.column; }
};

// ---- a thread is a fiber: it has a stack of its own and runs until it must wait for others
enum Wait { nothing, at_barrier, at_simd };
struct Scope;
struct Fiber {
    ucontext_t start;         // where it begins, on its own stack
    jmp_buf here;             // where it waits
    std::vector<char> stack;
    uint3 grid, local;        // its position in the grid and in its threadgroup
    uint index;               // the latter as one number
    bool begun, done;
    Wait wait;                // what it waits for,
    Site site;                // in which call,
    Scope* scope;             // and in which loops and functions
    int line;                 // the line of its last access
    uint ops;                 // SIMD functions so far
    uint fences[2];           // SIMD group barriers so far: for device, for threadgroup memory
};
struct Slot { double v[4]; }; // what a lane shows the others
struct Poisoned { virtual void poison() = 0; }; // memory that starts as NaN in every group
struct World {
    std::vector<Fiber> fibers;
    Fiber* now;                    // the one that runs
    jmp_buf scheduler;             // where to go when it waits
    std::vector<Slot> slots;       // two for each thread
    uint epochs[2];                // barriers so far: for device, for threadgroup memory
    int flags;                     // what the barrier that is being waited for orders
    uint3 grid, threads, groups, group;
    ulong group_index;
    std::vector<Poisoned*> shared; // the arrays in threadgroup memory,
    size_t bytes;                  // and their size
    char error[2000];              // the first fault, if there was one
    void (*body)();                // the kernel
};
static World& world() { static World w; return w; }
inline Fiber& self() { return *world().now; }

// the first fault ends the launch; its text becomes a Python exception
inline bool failed() { return world().error[0]; }
inline void complain(const char* format, va_list values) {
    if (!failed()) vsnprintf(world().error, sizeof world().error, format, values);
}
inline void complain(const char* format, ...) {
    va_list values;
    va_start(values, format);
    complain(format, values);
    va_end(values);
}
struct Fault {}; // leaves the thread that made it
[[noreturn]] inline void fault(const char* format, ...) {
    va_list values;
    va_start(values, format);
    complain(format, values);
    va_end(values);
    throw Fault();
}

// stop here, until the scheduler comes back to this thread
inline void wait(Wait why, Site site) {
    Fiber& f = self();
    f.wait = why;
    f.site = site;
    f.line = site.line;
    if (!_setjmp(f.here)) _longjmp(world().scheduler, 1);
}

// the whole life of a fiber
inline void entry() {
    try {
        world().body();
    } catch (const Fault&) {} // what it was is written down
    self().done = true;
    _longjmp(world().scheduler, 1);
}

// let a fiber run until it waits or ends
inline void resume(Fiber& f) {
    World& w = world();
    w.now = &f;
    f.wait = nothing;
    if (_setjmp(w.scheduler)) return; // it waits or has ended
    if (f.begun) _longjmp(f.here, 1);
    f.begun = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.data();
    f.start.uc_stack.ss_size = f.stack.size();
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
    setcontext(&f.start);
}

// show a value, wait for the other 31, see theirs
inline const Slot* exchange(const Slot& mine, Site site) {
    World& w = world();
    Fiber& f = self();
    size_t turn = (f.ops & 1) * w.fibers.size();
    Slot* s = &w.slots[turn + f.index / 32 * 32];
    s[f.index % 32] = mine;
    f.ops++;
    wait(at_simd, site);
    return s;
}

// a loop or a function of a header that this thread is in; a compiler that computes a constant is no thread
constexpr bool compiling() { return __builtin_is_constant_evaluated(); }
const uint most_rounds = 1 << 18; // of one loop: who waits for more waits for ever
struct Scope {
    Site site;      // of the loop, or of the call
    bool loop;
    uint round = 0; // of the loop, from 1
    Scope* outer;
    constexpr Scope(Site site, bool loop) : site(site), loop(loop), outer(nullptr) {
        if (compiling()) return;
        outer = self().scope;
        self().scope = this;
    }
    constexpr ~Scope() {
        if (!compiling()) self().scope = outer;
    }
    constexpr void next() {
        if (++round > most_rounds) fault("line %d: a loop goes round more than %u times", site.line, most_rounds);
    }
};

inline bool same_way(const Scope* a, const Scope* b) {
    for (; a && b; a = a->outer, b = b->outer)
        if (!(a->site == b->site) || a->round != b->round) return false;
    return a == b; // both at the end
}
inline bool same_place(const Fiber& a, const Fiber& b) {
    if (a.done || b.done) return a.done && b.done;
    return a.wait == b.wait && a.site == b.site && same_way(a.scope, b.scope);
}

// let threads go on if all of them wait at the same place
inline bool release(size_t from, size_t to, Wait what) {
    auto& f = world().fibers;
    for (size_t t = from; t < to; t++)
        if (f[t].done || f[t].wait != what || !same_place(f[t], f[from])) return false;
    for (size_t t = from; t < to; t++) f[t].wait = nothing;
    return true;
}

// where a thread is, in words
inline std::string place(const Fiber& f) {
    if (f.done) return "has ended";
    std::string text = f.wait == at_simd ? "is in a SIMD function of line " : "waits at the barrier of line ";
    text += std::to_string(f.site.line);
    for (Scope* s = f.scope; s; s = s->outer) {
        if (s->loop) text += ", round " + std::to_string(s->round) + " of the loop of line ";
        else text += ", called from line ";
        text += std::to_string(s->site.line);
    }
    return text;
}

inline bool is_among(const Fiber& f, const std::vector<const Fiber*>& others) {
    for (auto* o : others)
        if (same_place(f, *o)) return true;
    return false;
}
inline void divergence(size_t n) {
    std::string text, words, before;
    std::vector<const Fiber*> shown; // one for each place
    for (size_t t = 0; t < n && shown.size() < 3; t++) {
        const Fiber& f = world().fibers[t];
        if (is_among(f, shown)) continue;
        words = place(f);
        text += (shown.empty() ? "thread " : "; thread ") + std::to_string(f.index) + " " + words;
        if (words == before) text += " too, in another call"; // only the columns differ
        before = words;
        shown.push_back(&f);
    }
    complain("the threads of a group went different ways: %s", text.c_str());
}

// run one threadgroup of n threads to its end, or to the first fault
inline void run_group(size_t n) {
    World& w = world();
    w.epochs[0] = w.epochs[1] = 0;
    for (auto* m : w.shared) m->poison();
    for (size_t t = 0; t < n; t++) {
        Fiber& f = w.fibers[t];
        f.begun = f.done = false;
        f.ops = f.fences[0] = f.fences[1] = 0;
        f.wait = nothing;
        f.scope = nullptr;
    }
    while (!failed()) {
        size_t left = 0;
        for (size_t t = 0; t < n && !failed(); t++) {
            Fiber& f = w.fibers[t];
            if (!f.done && f.wait == nothing) resume(f);
            left += !f.done;
        }
        if (!left || failed()) return;

        bool moved = false;
        for (size_t g = 0; g < n; g += 32) {
            size_t end = g + 32 < n ? g + 32 : n;
            if (w.fibers[g].wait == at_simd && end - g < 32)
                return complain("line %d: a SIMD function in a group of %zu threads, "
                                "which is no multiple of 32",
                                w.fibers[g].line, n);
            moved |= release(g, end, at_simd);
        }
        if (!moved && release(0, n, at_barrier)) {
            for (int space = 0; space < 2; space++)
                if (w.flags >> space & 1) w.epochs[space]++;
            moved = true;
        }
        if (!moved) divergence(n);
    }
}

// ---- memory that knows its bounds, and who wrote and read each element
template <class T> struct Ref;
struct At {
    long i;
    int line;
    At(long i, int line = __builtin_LINE()) : i(i), line(line) {}
    template <class T> At(Ref<T>&& r, int line = __builtin_LINE()) // an index that is itself an element
        : i(r.m->read(r.a)), line(line) {}
};
enum Space { device_, threadgroup_, thread_ };
const int nobody = -1, many = -2;

// who wrote an element last, and who has read it since the last barrier
struct Touch {
    long group = -1;                   // the threadgroup that wrote,
    int writer = nobody;               // its thread,
    uint wepoch, wfence;               // and the barriers before that
    int reader = nobody, simd = nobody; // the thread that read and its SIMD group; or many
    uint repoch, rfence;
};

// this thread's place in time, for one kind of memory
struct Clock {
    int thread, simd;
    uint epoch, fence;
    Clock(Space s) {
        Fiber& f = self();
        thread = f.index;
        simd = thread / 32;
        epoch = s == thread_ ? 0 : world().epochs[s];
        fence = s == thread_ ? 0 : f.fences[s];
    }
    bool races_writer(const Touch& t) { // could both happen at once on a GPU?
        if (t.writer == nobody || t.writer == thread || t.wepoch != epoch) return false;
        return t.writer / 32 != simd || t.wfence == fence;
    }
    bool races_reader(const Touch& t) {
        if (t.reader == nobody || t.repoch != epoch) return false;
        return t.simd != simd || (t.rfence == fence && t.reader != thread);
    }
    void writes(Touch& t) {
        t.group = world().group_index;
        t.writer = thread;
        t.wepoch = epoch;
        t.wfence = fence;
    }
    void reads(Touch& t) {
        if (t.reader == nobody || t.repoch != epoch) { // the first since a barrier
            t.reader = thread;
            t.simd = simd;
        }
        else if (t.simd != simd) t.simd = many;
        else if (t.rfence != fence) t.reader = thread; // the first since a SIMD group's barrier
        else if (t.reader != thread) t.reader = many;
        t.repoch = epoch;
        t.rfence = fence;
    }
};

struct Watched : Poisoned {
    const char* name;
    Space space;
    bool writable;
    long n;
    std::vector<char> own;    // the memory itself, where the kernel declared it
    std::vector<Touch> touch; // of each element; none for inputs

    void poison() override {
        for (auto& t : touch) t = Touch();
        if (!own.empty()) memset(own.data(), 0xff, own.size()); // NaN, or -1
    }
    const char* barrier() { // what was missing; Metal wants to know for which memory
        return space == device_ ? "without a barrier for mem_device" : "without a barrier";
    }

    void may_touch(const At& a) {
        self().line = a.line;
        if (a.i < 0 || a.i >= n)
            fault("line %d: %s[%ld] is out of bounds: it has %ld elements", a.line, name, a.i, n);
    }
    void may_read(const At& a) {
        may_touch(a);
        if (touch.empty()) return;
        Touch& t = touch[a.i];
        Clock now(space);
        if (t.writer == nobody)
            fault("line %d: %s[%ld] is read before it was written", a.line, name, a.i);
        if (t.group != (long)world().group_index)
            fault("line %d: %s[%ld] is read but another threadgroup wrote it", a.line, name, a.i);
        if (now.races_writer(t))
            fault("line %d: %s[%ld] is read by thread %d %s after thread %d wrote it",
                  a.line, name, a.i, now.thread, barrier(), t.writer);
        now.reads(t);
    }
    void may_write(const At& a) {
        may_touch(a);
        if (!writable) fault("line %d: %s is an input and cannot be written", a.line, name);
        Touch& t = touch[a.i];
        Clock now(space);
        if (t.writer != nobody && t.group != (long)world().group_index)
            fault("line %d: %s[%ld] is written by two threadgroups", a.line, name, a.i);
        if (now.races_writer(t))
            fault("line %d: %s[%ld] is written by threads %d and %d %s between",
                  a.line, name, a.i, t.writer, now.thread, barrier());
        if (now.races_reader(t))
            fault("line %d: %s[%ld] is written by thread %d while another thread may still read it",
                  a.line, name, a.i, now.thread);
        now.writes(t);
    }
};

template <class T> struct Memory : Watched {
    T* data;
    Memory() {} // an input or output: `bind` says where it lies
    Memory(long size, const char* called, Space s) { // an array that the kernel declares
        name = called;
        space = s;
        writable = true;
        n = size;
        own.resize(n * sizeof(T));
        touch.resize(n);
        data = (T*)own.data();
        if (s == threadgroup_) {
            world().shared.push_back(this);
            world().bytes += own.size();
        }
        poison();
    }
    Memory(const Memory&) = delete; // a copy would not know who touched the original
    T read(const At& a) {
        may_read(a);
        return data[a.i];
    }
    void write(const At& a, T v) {
        may_write(a);
        data[a.i] = v;
    }
};

template <class T> struct Ref { // an element that was named but not yet read or written
    Memory<T>* m;
    At a;
    operator T() && { return m->read(a); }
    template <class U> explicit operator U() && { return static_cast<U>(m->read(a)); }
    T operator=(T v) && { m->write(a, v); return v; }
    T operator=(Ref&& r) && { T v = r.m->read(r.a); m->write(a, v); return v; }
    T operator+=(T v) && { v = m->read(a) + v; m->write(a, v); return v; }
    T operator-=(T v) && { v = m->read(a) - v; m->write(a, v); return v; }
    T operator*=(T v) && { v = m->read(a) * v; m->write(a, v); return v; }
};
template <class T> struct Ptr { // a pointer that stays inside its memory
    Memory<T>* m;
    long at;
    Ref<T> operator[](const At& a) const { return Ref<T>{m, At(at + a.i, a.line)}; }
    Ptr operator+(long i) const { return Ptr{m, at + i}; }
};

// an array that the kernel declares in threadgroup memory, and one that is a thread's own
template <class T> struct Shared : Memory<T> {
    Shared(long n, const char* name) : Memory<T>(n, name, threadgroup_) {}
    Ref<T> operator[](const At& a) { return Ref<T>{this, a}; }
    Ptr<T> operator+(long i) { return {this, i}; }
};
template <class T, long N> struct Local : Memory<T> {
    Local(const char* name) : Memory<T>(N, name, thread_) {}
    Ref<T> operator[](const At& a) { return Ref<T>{this, a}; }
};

template <class T> T pick(const Slot* s, uint lane, Site site) {
    if (lane > 31) fault("line %d: lane %u of a SIMD group, which has 32", site.line, lane);
    return (T)s[lane].v[0];
}
// the butterfly of a GPU: the same order of additions
template <class T, class F> T fold(T x, F f, Site site) {
    for (uint step = 16; step; step /= 2) {
        const Slot* s = exchange(Slot{{(double)x}}, site);
        x = f(x, pick<T>(s, self().index % 32 ^ step, site));
    }
    return x;
}

inline uint least(uint a, uint b) { return a < b ? a : b; }
inline uint groups(uint grid, uint threads) { return (grid + threads - 1) / threads; } // rounded up

// give the threads of group (x, y, z) their places; how many they are
inline size_t gather(uint x, uint y, uint z) {
    World& w = world();
    size_t n = 0;
    for (uint k = 0; k < w.threads.z; k++)
        for (uint j = 0; j < w.threads.y; j++)
            for (uint i = 0; i < w.threads.x; i++) {
                uint3 g = {x * w.threads.x + i, y * w.threads.y + j, z * w.threads.z + k};
                if (g.x >= w.grid.x || g.y >= w.grid.y || g.z >= w.grid.z) continue;
                Fiber& f = w.fibers[n];
                f.grid = g;
                f.local = {i, j, k};
                f.index = n++;
            }
    w.group = {x, y, z};
    return n;
}

// the system's signal for a division by zero, in the thread that did it
inline void divided(int) {
    complain("line %d or soon after: a whole number is divided by zero", self().line);
    _longjmp(world().scheduler, 1);
}

inline void launch(void (*body)(), uint* grid, uint* threads) {
    World& w = world();
    w.body = body;
    w.error[0] = 0;
    w.group_index = 0;
    w.grid = {grid[0], grid[1], grid[2]};
    w.threads = {least(threads[0], grid[0]), least(threads[1], grid[1]), least(threads[2], grid[2])};
    w.groups = {groups(grid[0], w.threads.x), groups(grid[1], w.threads.y), groups(grid[2], w.threads.z)};
    size_t most = groups(w.threads.x * w.threads.y * w.threads.z, 32) * 32; // whole SIMD groups
    w.fibers.resize(most);
    w.slots.resize(2 * most);
    for (auto& f : w.fibers) f.stack.resize(1 << 16);

    struct sigaction ours {}, theirs;
    ours.sa_handler = divided;
    ours.sa_flags = SA_NODEFER;
    sigaction(SIGFPE, &ours, &theirs);
    for (uint z = 0; z < w.groups.z && !failed(); z++)
        for (uint y = 0; y < w.groups.y && !failed(); y++)
            for (uint x = 0; x < w.groups.x && !failed(); x++) {
                run_group(gather(x, y, z));
                if (w.bytes > 32768)
                    complain("its %zu bytes of threadgroup memory are more than the 32768 there are", w.bytes);
                w.group_index++;
            }
    sigaction(SIGFPE, &theirs, nullptr);
}

struct Arg { void* data; long n; int ndim, shape[8]; };
struct Shape { // of an input
    const char* name;
    Arg* arg;
    int operator[](const At& a) const {
        self().line = a.line;
        if (a.i < 0 || a.i >= arg->ndim)
            fault("line %d: %s_shape[%ld] is out of bounds: %s has %d dimension%s",
                  a.line, name, a.i, name, arg->ndim, arg->ndim == 1 ? "" : "s");
        return arg->shape[a.i];
    }
};

template <class T> void bind(Memory<T>& m, Arg& a, const char* name, bool output) {
    m.name = name;
    m.space = device_;
    m.writable = output;
    m.data = (T*)a.data;
    m.n = a.n;
    m.touch.clear();
    if (output) {
        m.touch.resize(m.n);
        memset(a.data, 0xff, a.n * sizeof(T));
    }
}

inline void all_written(Watched& m) {
    if (failed()) return;
    long missing = 0, first = -1;
    for (long i = 0; i < m.n; i++)
        if (m.touch[i].writer == nobody && missing++ == 0) first = i;
    if (missing)
        complain("%ld of the %ld elements of output %s were never written, the first is %s[%ld]",
                 missing, m.n, m.name, m.name, first);
}

inline int report(char* error, int room) {
    strncpy(error, world().error, room - 1);
    error[room - 1] = 0;
    return failed();
}
}

// ---- Metal's vocabulary
#define device
#define constant
#define thread
#define SITE host::Here site = host::Here::current()
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

// stored in 16 bits, computed as float
struct half {
    uint16_t bits;
    half() = default;
    explicit half(float f) {
        _Float16 h = (_Float16)f;
        memcpy(&bits, &h, 2);
    }
    explicit operator float() const {
        _Float16 h;
        memcpy(&h, &bits, 2);
        return (float)h;
    }
};
struct bfloat16_t { // the upper half of a float, rounded to even
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float f) {
        uint32_t u;
        memcpy(&u, &f, 4);
        bits = f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    explicit operator float() const {
        uint32_t u = (uint32_t)bits << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
};
typedef half float16_t;

namespace metal {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline float abs(float x) { return std::fabs(x); }
inline float max(float a, float b) { return a > b ? a : b; }
inline float min(float a, float b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags flags, SITE) {
    host::world().flags = (int)flags;
    host::wait(host::at_barrier, site);
}
inline void simdgroup_barrier(mem_flags flags, SITE) {
    host::exchange(host::Slot{}, site);
    for (int space = 0; space < 2; space++)
        if ((int)flags >> space & 1) host::self().fences[space]++;
}

inline float simd_sum(float x, SITE) {
    return host::fold(x, [](float a, float b) { return a + b; }, site);
}
inline float simd_max(float x, SITE) {
    return host::fold(x, [](float a, float b) { return a > b ? a : b; }, site);
}
template <class T> T simd_shuffle(T x, ushort lane, SITE) {
    return host::pick<T>(host::exchange(host::Slot{{(double)x}}, site), lane, site);
}
template <class T> T simd_shuffle_xor(T x, ushort mask, SITE) {
    return simd_shuffle(x, host::self().index % 32 ^ mask, site);
}
template <class T> T simd_broadcast(T x, ushort lane, SITE) { return simd_shuffle(x, lane, site); }
inline float simd_prefix_inclusive_sum(float x, SITE) {
    uint lane = host::self().index % 32;
    for (uint step = 1; step < 32; step *= 2) {
        const host::Slot* s = host::exchange(host::Slot{{x}}, site);
        if (lane >= step) x += host::pick<float>(s, lane - step, site);
    }
    return x;
}

// an 8 by 8 matrix of a SIMD group: two neighbours of a row in each lane, NaN at first
struct simdgroup_float8x8 {
    float e[2] = {NAN, NAN};
    float* thread_elements() { return e; }
};
template <long N> struct Matrices { // an array of them; its elements are changed in place
    simdgroup_float8x8 own[N];
    simdgroup_float8x8* m = own;
    const char* name;
    Matrices(const char* name) : name(name) {}
    Matrices(const Matrices& other) : m(other.m), name(other.name) {} // as an argument: the same matrices
    simdgroup_float8x8& operator[](const host::At& a) {
        if (a.i < 0 || a.i >= N)
            host::fault("line %d: %s[%ld] is out of bounds: it has %ld elements", a.line, name, a.i, N);
        return m[a.i];
    }
};
inline void place(uint lane, uint& r, uint& c) { // the row, and the first of two columns
    uint q = lane / 4;
    r = (q & 4) + lane / 2 % 4;
    c = (q & 2) * 2 + lane % 2 * 2;
}
inline uint holder(uint r, uint c) { // the lane of an element
    return ((r & 4) << 2) + ((r & 3) << 1) + ((c & 4) << 1) + ((c & 2) >> 1);
}

template <class T, int R, int C> simdgroup_float8x8 make_filled_simdgroup_matrix(T x) { return {{x, x}}; }
template <class P>
void simdgroup_load(simdgroup_float8x8& m, P&& p, ulong ld, int = 0, bool transpose = false, SITE) {
    uint r, c;
    place(host::self().index % 32, r, c);
    for (uint j = 0; j < 2; j++)
        m.e[j] = (float)p[host::At(transpose ? (c + j) * ld + r : r * ld + c + j, site.line())];
    host::exchange(host::Slot{}, site);
}
template <class P> void simdgroup_store(simdgroup_float8x8 m, P&& p, ulong ld, SITE) {
    uint r, c;
    place(host::self().index % 32, r, c);
    for (uint j = 0; j < 2; j++) p[host::At(r * ld + c + j, site.line())] = m.e[j];
    host::exchange(host::Slot{}, site);
}

// d = a b + c: every lane shows its elements of a and b and computes its two of d
inline void simdgroup_multiply_accumulate(
    simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c, SITE
) {
    const host::Slot* s = host::exchange(host::Slot{{a.e[0], a.e[1], b.e[0], b.e[1]}}, site);
    uint r, k;
    place(host::self().index % 32, r, k);
    for (uint j = 0; j < 2; j++) {
        float x = c.e[j];
        for (uint i = 0; i < 8; i++) {
            float left = s[holder(r, i)].v[i % 2];
            float right = s[holder(i, k + j)].v[2 + (k + j) % 2];
            x = std::fma(left, right, x);
        }
        d.e[j] = x;
    }
}
inline void simdgroup_multiply(
    simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, SITE
) {
    simdgroup_multiply_accumulate(d, a, b, simdgroup_float8x8{{0, 0}}, site);
}
}
using namespace metal;

// ---- what a kernel's text becomes
namespace host {
struct Unset { // the value of a variable that has none yet
    template <class T> operator T() const {
        T v;
        memset((void*)&v, 0xff, sizeof v); // NaN, or -1
        return v;
    }
};
}
#define CALLER host::Here host_caller = host::Here::current()
#define CALLED host::Scope host_call(host_caller, false);
#define LOOP if (host::Scope host_loop({__LINE__, __COUNTER__}, true); false) {} else
#define for(...) LOOP for (__VA_ARGS__) if (host_loop.next(), false) {} else
#define WHILE(...) LOOP while (__VA_ARGS__) if (host_loop.next(), false) {} else
