// The exact search's inner loops for x86: products in low precision, selection while they are in the nearest cache,
// float64 scores of what could still be among the first k. native.py compiles and calls it; native_kernel.py says why
// nothing is lost; score.py defines a score, bit by bit.
//
// One build holds what one kind of processor can do, chosen by the compiler's flags: AVX2, AVX-512, AVX-512 with
// bfloat16, AMX. Arithmetic that must give the same bits everywhere is written in plain C++ and built without
// contraction (-ffp-contract=off).
//
// Layout. A number is float32 or bfloat16; a group is 32 bits of consecutive components of one vector: one float32 or
// two bfloat16. A tile is 16 rows x 16 groups = 1 KiB; a step is 16 groups of the dimension, which is padded with zeros.
//   rows:    [N / 16][steps] tiles, each [row][group]
//   panels:  [Q / 64][steps][4] tiles, each [group][query]: 64 queries side by side
//   sums:    [4][row][query] float32: the products of 16 rows with a panel

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__AMX_BF16__) && !defined(PLUMBLINE_EMULATED_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t SIDE = 16;                       // rows, queries and groups of a tile
constexpr int64_t PANEL = 4 * SIDE;                // queries
constexpr int64_t LINE = 64;                       // bytes: 16 groups
constexpr int64_t TILE = SIDE * LINE;              // bytes
#if defined(__AMX_BF16__)
constexpr int64_t CHUNK = 768 << 10, SLICE = 8;    // bytes of rows that stay in the second cache, and steps of a panel
#else                                              // (4 KiB each) in the nearest; AMX comes with larger ones
constexpr int64_t CHUNK = 512 << 10, SLICE = 4;
#endif
constexpr int64_t PANELS_PER_ITEM = 16;            // their rows are read from memory once for so many queries
constexpr uint32_t NO_ROW = UINT32_MAX;            // a hit of an earlier window
constexpr int64_t RANKS = (int64_t{1} << 32) - 1;  // score.py: the low half of a key
constexpr int64_t OVERFLOW_ = -1, NO_MEMORY = -2;

struct Aligned {
    void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Aligned>;

template <class T>
Buffer<T> buffer(int64_t count) {
    size_t bytes = (count * sizeof(T) + LINE - 1) / LINE * LINE;
    void* memory = std::aligned_alloc(LINE, std::max<size_t>(bytes, LINE));
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return Buffer<T>(static_cast<T*>(memory));
}

// `work(number)` for every number below `count`, on so many threads; false if memory ran out.
template <class Work>
bool in_threads(int threads, int64_t count, const Work& work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto run = [&] {
        try {
            for (int64_t number; !failed && (number = next.fetch_add(1)) < count;) work(number);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    for (int64_t number = 1; number < std::min<int64_t>(threads, count); number++) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
    return !failed;
}

// ---- stored vectors, and scores as score.py defines them

struct Stored {
    const void* values;
    int64_t dimension;
    bool is_half;

    const char* row(int64_t number) const {
        return static_cast<const char*>(values) + number * dimension * (is_half ? 2 : 4);
    }

    void read(int64_t number, float* into) const {
        if (!is_half) {
            std::memcpy(into, row(number), dimension * sizeof(float));
            return;
        }
        auto halves = reinterpret_cast<const uint16_t*>(row(number));
        int64_t place = 0;
        for (; place + 8 <= dimension; place += 8) {
            __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + place));
            _mm256_storeu_ps(into + place, _mm256_cvtph_ps(eight));
        }
        for (; place < dimension; place++) into[place] = _cvtsh_ss(halves[place]);
    }

    void prefetch(int64_t number) const {
        const char* start = row(number);
        for (int64_t byte = 0; byte < dimension * (is_half ? 2 : 4); byte += LINE) __builtin_prefetch(start + byte);
    }
};

// The sum of `terms` by folding the upper half onto the lower; overwrites them.
double folded_sum(double* terms, int64_t count) {
    while (count > 1) {
        int64_t half = (count + 1) / 2;
        for (int64_t place = 0; place < count - half; place++) terms[place] += terms[half + place];
        count = half;
    }
    return terms[0];
}

// <left, right> as score.py adds it up; `terms` is scratch. Products of stored values are exact in float64.
double product(const float* left, const float* right, int64_t dimension, double* terms) {
    for (int64_t place = 0; place < dimension; place++) terms[place] = double(left[place]) * double(right[place]);
    return folded_sum(terms, dimension);
}

int64_t key_of(double dot, double scale, int64_t rank) {
    float score = (scale > 0 ? float(dot / scale) : 0.0f) + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    int32_t ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    return int64_t(uint64_t(int64_t(ordered)) << 32) + (RANKS - rank);
}

// Puts new keys into the k best of a query, which stay in descending order.
void merge(int64_t* best, int64_t k, std::vector<int64_t>& fresh) {
    fresh.insert(fresh.end(), best, best + k);
    std::partial_sort(fresh.begin(), fresh.begin() + k, fresh.end(), std::greater<int64_t>());
    std::copy(fresh.begin(), fresh.begin() + k, best);
}

// ---- numbers and tiles

struct Float32 {
    static constexpr int64_t PER_GROUP = 1;
    using Bits = uint32_t;
    static Bits round(float value) {
        Bits bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits;
    }
    static float widen(Bits bits) {
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

struct BFloat16 {
    static constexpr int64_t PER_GROUP = 2;
    using Bits = uint16_t;
    static Bits round(float value) {  // to nearest, ties to even; every value here is finite
        uint32_t bits = Float32::round(value);
        return Bits((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
    static float widen(Bits bits) { return Float32::widen(uint32_t(bits) << 16); }
};

template <class Number>
int64_t steps_of(int64_t dimension) {
    return (dimension + SIDE * Number::PER_GROUP - 1) / (SIDE * Number::PER_GROUP);
}

#if defined(__AVX512F__)
using Lanes = __m512;
template <class Number>
Lanes fused(Lanes sums, const char* group, const char* queries) {
    int32_t bits;
    std::memcpy(&bits, group, sizeof bits);
    __m512i left = _mm512_set1_epi32(bits), right = _mm512_load_si512(queries);
#if defined(__AVX512BF16__)
    if (Number::PER_GROUP == 2) return _mm512_dpbf16_ps(sums, (__m512bh)left, (__m512bh)right);
#endif
    return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sums);
}
Lanes load(const float* from) { return _mm512_load_ps(from); }
void store(float* to, Lanes lanes) { _mm512_store_ps(to, lanes); }
unsigned reaching(const float* sums, const float* floors) {
    return _mm512_cmp_ps_mask(_mm512_load_ps(sums), _mm512_load_ps(floors), _CMP_GE_OQ);
}
#else
using Lanes = __m256;
template <class Number>
Lanes fused(Lanes sums, const char* group, const char* queries) {
    float left;
    std::memcpy(&left, group, sizeof left);
    return _mm256_fmadd_ps(_mm256_set1_ps(left), _mm256_load_ps(reinterpret_cast<const float*>(queries)), sums);
}
Lanes load(const float* from) { return _mm256_load_ps(from); }
void store(float* to, Lanes lanes) { _mm256_store_ps(to, lanes); }
unsigned reaching(const float* sums, const float* floors) {
    unsigned low = _mm256_movemask_ps(_mm256_cmp_ps(load(sums), load(floors), _CMP_GE_OQ));
    unsigned high = _mm256_movemask_ps(_mm256_cmp_ps(load(sums + 8), load(floors + 8), _CMP_GE_OQ));
    return low | high << 8;
}
#endif
constexpr int64_t WIDTH = sizeof(Lanes) / sizeof(float), PER_TILE = SIDE / WIDTH;

// Adds the products of 16 rows with a panel over some steps; `sums` start from zero if these are the first.
template <class Number>
void add_products(const char* rows, const char* panel, int64_t steps, float* sums, bool is_first) {
    constexpr int64_t TALL = 4, WIDE = WIDTH == SIDE ? 4 : 2;  // as many sums as there are registers for
    for (int64_t row = 0; row < SIDE; row += TALL)
        for (int64_t first = 0; first < 4 * PER_TILE; first += WIDE) {
            Lanes held[TALL][WIDE];
            auto place = [&](int64_t tall, int64_t wide) {
                int64_t lane = first + wide;
                return sums + (lane / PER_TILE * SIDE + row + tall) * SIDE + lane % PER_TILE * WIDTH;
            };
            for (int64_t tall = 0; tall < TALL; tall++)
                for (int64_t wide = 0; wide < WIDE; wide++)
                    held[tall][wide] = is_first ? Lanes{} : load(place(tall, wide));
            for (int64_t step = 0; step < steps; step++) {
                const char* left = rows + step * TILE + row * LINE;
                const char* right = panel + step * 4 * TILE;
                for (int64_t group = 0; group < SIDE; group++)
                    for (int64_t tall = 0; tall < TALL; tall++)
                        for (int64_t wide = 0; wide < WIDE; wide++) {
                            int64_t lane = first + wide;
                            held[tall][wide] = fused<Number>(
                                held[tall][wide], left + tall * LINE + group * 4,
                                right + lane / PER_TILE * TILE + group * LINE + lane % PER_TILE * WIDTH * 4);
                        }
            }
            for (int64_t tall = 0; tall < TALL; tall++)
                for (int64_t wide = 0; wide < WIDE; wide++) store(place(tall, wide), held[tall][wide]);
        }
}

#if defined(PLUMBLINE_EMULATED_TILES)
#include PLUMBLINE_EMULATED_TILES  // tile registers in software, to test the lines below on any processor
#endif

#if defined(__AMX_BF16__) || defined(PLUMBLINE_EMULATED_TILES)
// Asks the system for the tile registers, which it gives only on request; false if it does not.
bool ask_for_tiles() {
#if defined(PLUMBLINE_EMULATED_TILES)
    return true;
#else
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

void open_tiles() {
    static thread_local bool is_open = false;
    if (is_open) return;
    struct alignas(LINE) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {};
        uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; tile++) shape.bytes_per_row[tile] = LINE, shape.rows[tile] = SIDE;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&shape);
    is_open = true;
}

template <>
void add_products<BFloat16>(const char* rows, const char* panel, int64_t steps, float* sums, bool is_first) {
    __asm__ volatile("" ::: "memory");  // the intrinsics do not say what they read
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, LINE);
        _tile_loadd(1, sums + SIDE * SIDE, LINE);
        _tile_loadd(2, sums + 2 * SIDE * SIDE, LINE);
        _tile_loadd(3, sums + 3 * SIDE * SIDE, LINE);
    }
    for (int64_t step = 0; step < steps; step++, rows += TILE, panel += 4 * TILE) {
        _tile_loadd(4, rows, LINE);
        _tile_loadd(5, panel, LINE);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, panel + TILE, LINE);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, panel + 2 * TILE, LINE);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, panel + 3 * TILE, LINE);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, sums, LINE);
    _tile_stored(1, sums + SIDE * SIDE, LINE);
    _tile_stored(2, sums + 2 * SIDE * SIDE, LINE);
    _tile_stored(3, sums + 3 * SIDE * SIDE, LINE);
    __asm__ volatile("" ::: "memory");
}
constexpr bool HAS_BFLOAT16 = true;
#else
bool ask_for_tiles() { return true; }
void open_tiles() {}
#if defined(__AVX512BF16__)
constexpr bool HAS_BFLOAT16 = true;
#else
constexpr bool HAS_BFLOAT16 = false;
#endif
#endif

// ---- the pass over a window

struct Hit {
    float product;
    uint32_t row;
};

// What is kept of one query while rows go by.
struct Kept {
    std::vector<Hit> hits;
    size_t room;
};

struct Search {
    const char* rows;
    const char* panels;
    const float* margins;   // [Q]: a product this far below the k-th best cannot belong to the first k
    const float* earlier;   // [Q, k]: products that the hits of earlier windows stand for, -inf for none
    int64_t num_rows, num_queries, k, steps;
    std::atomic<int64_t> spare;  // hits that may still be held beyond the first room; below 0: too many survive
};

// The least product with which a row may still be among the first k, given k that reach `kth`.
float floor_below(float kth, float margin) {
    return std::nextafter(kth - margin, -std::numeric_limits<float>::infinity());
}

// Drops what cannot be among the first k, and returns the floor.
float prune(std::vector<Hit>& hits, int64_t k, float margin) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    if (int64_t(hits.size()) < k) return LOWEST;
    std::nth_element(hits.begin(), hits.begin() + (k - 1), hits.end(),
                     [](const Hit& left, const Hit& right) { return left.product > right.product; });
    float kth = hits[k - 1].product;
    if (kth == LOWEST) return LOWEST;
    float floor = floor_below(kth, margin);
    hits.erase(std::remove_if(hits.begin(), hits.end(), [&](const Hit& hit) { return hit.product < floor; }),
               hits.end());
    return floor;
}

// A range of rows for a group of panels: what one thread works on, and what it keeps.
struct Item {
    int64_t first_row, last_row, first_panel, last_panel;
    std::vector<Kept> kept;
    Buffer<float> floors;

    void start(const Search& search) {
        int64_t count = (last_panel - first_panel) * PANEL, first = first_panel * PANEL;
        kept.resize(count);
        floors = buffer<float>(count);
        for (int64_t place = 0; place < count; place++) {
            floors[place] = std::numeric_limits<float>::infinity();  // the queries that fill up the last panel
            if (first + place >= search.num_queries) continue;
            const float* earlier = search.earlier + (first + place) * search.k;
            kept[place].room = std::max<size_t>(4 * search.k, 128);
            for (int64_t number = 0; number < search.k; number++)
                if (std::isfinite(earlier[number])) kept[place].hits.push_back({earlier[number], NO_ROW});
            floors[place] = prune(kept[place].hits, search.k, search.margins[first + place]);
        }
    }

    void keep(Search& search, int64_t place, float product, int64_t row) {
        Kept& query = kept[place];
        query.hits.push_back({product, uint32_t(row)});
        if (query.hits.size() < query.room) return;
        floors[place] = prune(query.hits, search.k, search.margins[first_panel * PANEL + place]);
        if (query.hits.size() > query.room / 4 * 3) {
            search.spare -= query.room;
            query.room *= 2;
        }
    }

    void select(Search& search, const float* sums, int64_t panel, int64_t first) {
        for (int64_t tile = 0; tile < 4; tile++, sums += SIDE * SIDE) {
            int64_t place = (panel - first_panel) * PANEL + tile * SIDE;
            alignas(LINE) float highest[SIDE];
            std::copy(sums, sums + SIDE, highest);
            for (int64_t row = 1; row < SIDE; row++)
                for (int64_t lane = 0; lane < SIDE; lane++) {
                    float sum = sums[row * SIDE + lane];
                    highest[lane] = highest[lane] > sum ? highest[lane] : sum;
                }
            if (!reaching(highest, &floors[place])) continue;
            for (int64_t row = 0; row < SIDE && first + row < last_row; row++)
                for (unsigned mask = reaching(sums + row * SIDE, &floors[place]); mask; mask &= mask - 1) {
                    int64_t lane = __builtin_ctz(mask);
                    keep(search, place + lane, sums[row * SIDE + lane], first + row);
                }
        }
    }

    template <class Number>
    void scan(Search& search) {
        open_tiles();
        start(search);
        int64_t tile_row = search.steps * TILE, rows_per_chunk = std::max<int64_t>(1, CHUNK / tile_row) * SIDE;
        auto sums = buffer<float>(rows_per_chunk / SIDE * PANEL * SIDE);
        for (int64_t begin = first_row; begin < last_row && search.spare >= 0; begin += rows_per_chunk) {
            int64_t end = std::min(begin + rows_per_chunk, last_row);
            for (int64_t panel = first_panel; panel < last_panel; panel++)
                for (int64_t step = 0; step < search.steps; step += SLICE) {
                    int64_t count = std::min(SLICE, search.steps - step);
                    const char* right = search.panels + (panel * search.steps + step) * 4 * TILE;
                    for (int64_t row = begin; row < end; row += SIDE) {
                        const char* left = search.rows + row / SIDE * tile_row + step * TILE;
                        float* now = &sums[(row - begin) * PANEL];
                        add_products<Number>(left, right, count, now, step == 0);
                        if (step + count == search.steps) select(search, now, panel, row);
                    }
                }
        }
    }
};

// Panels are dealt out so that every thread has the same number of items; where they are too few, rows are parted too.
std::vector<Item> items_of(const Search& search, int threads) {
    int64_t panels = (search.num_queries + PANEL - 1) / PANEL, tiles = (search.num_rows + SIDE - 1) / SIDE;
    int64_t groups = (panels + PANELS_PER_ITEM - 1) / PANELS_PER_ITEM;
    groups = std::min(panels, (groups + threads - 1) / threads * threads);
    int64_t ranges = std::min(tiles, (threads + groups - 1) / groups);
    std::vector<Item> items;
    for (int64_t range = 0; range < ranges; range++)
        for (int64_t group = 0; group < groups; group++)
            items.push_back({tiles * range / ranges * SIDE, std::min(tiles * (range + 1) / ranges * SIDE, search.num_rows),
                             panels * group / groups, panels * (group + 1) / groups, {}, nullptr});
    return items;
}

// What all items kept of a query, pruned together.
std::vector<Hit> kept_of(std::vector<Item>& items, const Search& search, int64_t query) {
    std::vector<Hit> hits;
    bool has_earlier = false;
    for (Item& item : items) {
        int64_t place = query - item.first_panel * PANEL;
        if (place < 0 || query >= item.last_panel * PANEL) continue;
        for (const Hit& hit : item.kept[place].hits)
            if (hit.row != NO_ROW || !has_earlier) hits.push_back(hit);
        has_earlier = true;
        item.kept[place].hits = {};
    }
    prune(hits, search.k, search.margins[query]);
    hits.erase(std::remove_if(hits.begin(), hits.end(), [](const Hit& hit) { return hit.row == NO_ROW; }), hits.end());
    return hits;
}

template <class Number>
void pack_row(const float* centred, int64_t row, int64_t steps, char* packed) {
    char* tiles = packed + row / SIDE * steps * TILE + row % SIDE * LINE;
    constexpr int64_t PER_LINE = SIDE * Number::PER_GROUP;
    for (int64_t step = 0; step < steps; step++) {
        typename Number::Bits line[PER_LINE];
        for (int64_t place = 0; place < PER_LINE; place++) line[place] = Number::round(centred[step * PER_LINE + place]);
        std::memcpy(tiles + step * TILE, line, LINE);
    }
}

// Norms of a row and of what rounding takes from it, in float32: each off by less than (D + 2) 2^-24 of itself.
template <class Number>
std::pair<float, float> norms_of(const float* centred, int64_t padded) {
    float norm[SIDE] = {}, residual[SIDE] = {};
    for (int64_t place = 0; place < padded; place += SIDE)
        for (int64_t lane = 0; lane < SIDE; lane++) {
            float value = centred[place + lane], lost = value - Number::widen(Number::round(value));
            norm[lane] += value * value;
            residual[lane] += lost * lost;
        }
    return {std::sqrt(std::accumulate(norm, norm + SIDE, 0.0f)),
            std::sqrt(std::accumulate(residual, residual + SIDE, 0.0f))};
}

void raise(std::atomic<float>& highest, float value) {
    float seen = highest.load();
    while (value > seen && !highest.compare_exchange_weak(seen, value)) {
    }
}

constexpr int64_t ROWS_AT_ONCE = 256;

template <class Number>
bool pack_rows(Stored stored, int64_t num_rows, const double* norms, const float* mean, int threads, char* packed,
               float* largest) {
    int64_t steps = steps_of<Number>(stored.dimension), padded = steps * SIDE * Number::PER_GROUP;
    std::atomic<float> norm{0.0f}, residual{0.0f};
    bool done = in_threads(threads, (num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int64_t part) {
        auto centred = buffer<float>(padded);
        for (int64_t row = part * ROWS_AT_ONCE; row < std::min((part + 1) * ROWS_AT_ONCE, num_rows); row++) {
            stored.read(row, centred.get());
            double length = norms[row];
            if (length > 1e-20 && length < 1e20) {
                float scale = float(1.0 / length);
                for (int64_t place = 0; place < stored.dimension; place++)
                    centred[place] = centred[place] * scale - mean[place];
            } else {  // a float32 reciprocal would overflow or lose bits; a zero vector stays zero
                for (int64_t place = 0; place < stored.dimension; place++)
                    centred[place] = float(double(centred[place]) / (length > 0 ? length : 1.0) - double(mean[place]));
            }
            pack_row<Number>(centred.get(), row, steps, packed);
            auto [whole, lost] = norms_of<Number>(centred.get(), padded);
            raise(norm, whole);
            raise(residual, lost);
        }
    });
    std::vector<float> nothing(padded);
    for (int64_t row = num_rows; row % SIDE; row++) pack_row<Number>(nothing.data(), row, steps, packed);
    largest[0] = norm, largest[1] = residual;
    return done;
}

template <class Number>
bool pack_panels(const float* queries, int64_t num_queries, int64_t dimension, int threads, char* panels) {
    int64_t steps = steps_of<Number>(dimension);
    return in_threads(threads, (num_queries + PANEL - 1) / PANEL, [&](int64_t panel) {
        char* start = panels + panel * steps * 4 * TILE;
        std::memset(start, 0, steps * 4 * TILE);
        for (int64_t query = panel * PANEL; query < std::min((panel + 1) * PANEL, num_queries); query++)
            for (int64_t place = 0; place < dimension; place++) {
                int64_t group = place / Number::PER_GROUP;
                auto bits = Number::round(queries[query * dimension + place]);
                char* tile = start + (group / SIDE * 4 + query % PANEL / SIDE) * TILE;
                std::memcpy(tile + group % SIDE * LINE + query % SIDE * 4 + place % Number::PER_GROUP * sizeof bits, &bits,
                            sizeof bits);
            }
    });
}

}  // namespace

// Arrays are C-contiguous; `is_half` says float16 or float32; `is_narrow` says bfloat16 or float32 in the pass.
// Every function returns 0 or more, or NO_MEMORY.
extern "C" {

// To be called once, before anything else; not 0 if the system does not let us use what this was built for.
int64_t plumbline_start() { return ask_for_tiles() ? 0 : 1; }

// norms [N]: Euclidean norms in float64, not finite exactly where a row holds NaN or infinity.
int64_t plumbline_norms(const void* values, int is_half, int64_t num_rows, int64_t dimension, int threads,
                        double* norms) {
    Stored stored{values, dimension, bool(is_half)};
    bool done = in_threads(threads, (num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int64_t part) {
        auto row_values = buffer<float>(dimension);
        auto terms = buffer<double>(dimension);
        for (int64_t row = part * ROWS_AT_ONCE; row < std::min((part + 1) * ROWS_AT_ONCE, num_rows); row++) {
            stored.read(row, row_values.get());
            norms[row] = std::sqrt(product(row_values.get(), row_values.get(), dimension, terms.get()));
        }
    });
    return done ? 0 : NO_MEMORY;
}

// total [D]: the sum of the unit vectors in grains of 1 / `grains`, each component rounded to one: exact, in any order.
int64_t plumbline_sum_of_units(const void* values, int is_half, int64_t num_rows, int64_t dimension,
                               const double* norms, double grains, int threads, double* total) {
    Stored stored{values, dimension, bool(is_half)};
    std::vector<Buffer<double>> sums(threads);
    bool done = in_threads(threads, threads, [&](int64_t part) {
        sums[part] = buffer<double>(dimension);
        double* sum = sums[part].get();
        auto row_values = buffer<float>(dimension);
        for (int64_t row = num_rows * part / threads; row < num_rows * (part + 1) / threads; row++) {
            if (!(norms[row] > 0)) continue;
            stored.read(row, row_values.get());
            double norm = norms[row];
            for (int64_t place = 0; place < dimension; place++)  // adding and taking 1.5 x 2^52 rounds, ties to even
                sum[place] += (double(row_values[place]) / norm * grains + 0x1.8p52) - 0x1.8p52;
        }
    });
    for (int64_t part = 0; done && part < threads; part++)
        for (int64_t place = 0; place < dimension; place++) total[place] += sums[part][place];
    return done ? 0 : NO_MEMORY;
}

// Bytes of a packed vector: rows are packed in sixteens, queries in panels of 64.
int64_t plumbline_packed_bytes(int64_t dimension, int is_narrow) {
    return (is_narrow ? steps_of<BFloat16>(dimension) : steps_of<Float32>(dimension)) * LINE;
}

// Unit vectors minus the mean; largest [2]: the largest norm of them, and of what rounding took.
int64_t plumbline_pack_rows(const void* values, int is_half, int64_t num_rows, int64_t dimension, const double* norms,
                            const float* mean, int is_narrow, int threads, char* packed, float* largest) {
    Stored stored{values, dimension, bool(is_half)};
    auto pack = is_narrow ? pack_rows<BFloat16> : pack_rows<Float32>;
    return pack(stored, num_rows, norms, mean, threads, packed, largest) ? 0 : NO_MEMORY;
}

int64_t plumbline_pack_panels(const float* queries, int64_t num_queries, int64_t dimension, int is_narrow, int threads,
                              char* panels) {
    auto pack = is_narrow ? pack_panels<BFloat16> : pack_panels<Float32>;
    return pack(queries, num_queries, dimension, threads, panels) ? 0 : NO_MEMORY;
}

// Searches packed rows for a block of queries and merges what it finds into keys [Q, k]. Returns how many pairs were
// scored in float64, or OVERFLOW_, with no key changed, if more than `spare` hits had to be held.
int64_t plumbline_search(const char* rows, const char* panels, int is_narrow, const float* margins,
                         const float* earlier, const void* values, int values_are_half, const double* row_norms,
                         const int64_t* ranks, int64_t num_rows, const void* queries, int queries_are_half,
                         const double* query_norms, int64_t num_queries, int64_t dimension, int64_t k, int64_t spare,
                         int threads, int64_t* keys) {
    Search search{rows, panels, margins, earlier, num_rows, num_queries, k,
                  is_narrow ? steps_of<BFloat16>(dimension) : steps_of<Float32>(dimension), {spare}};
    if (is_narrow && !HAS_BFLOAT16) return NO_MEMORY;
    auto scan = is_narrow ? &Item::scan<BFloat16> : &Item::scan<Float32>;
    auto items = items_of(search, threads);
    if (!in_threads(threads, items.size(), [&](int64_t number) { (items[number].*scan)(search); })) return NO_MEMORY;
    if (search.spare < 0) return OVERFLOW_;
    Stored stored_rows{values, dimension, bool(values_are_half)}, stored_queries{queries, dimension, bool(queries_are_half)};
    std::atomic<int64_t> scored{0};
    bool done = in_threads(threads, num_queries, [&](int64_t query) {
        auto hits = kept_of(items, search, query);
        auto left = buffer<float>(dimension), right = buffer<float>(dimension);
        auto terms = buffer<double>(dimension);
        stored_queries.read(query, left.get());
        std::vector<int64_t> fresh;
        for (size_t number = 0; number < hits.size(); number++) {
            if (number + 2 < hits.size()) stored_rows.prefetch(hits[number + 2].row);
            int64_t row = hits[number].row;
            stored_rows.read(row, right.get());
            double dot = product(left.get(), right.get(), dimension, terms.get());
            fresh.push_back(key_of(dot, query_norms[query] * row_norms[row], ranks[row]));
        }
        merge(keys + query * k, k, fresh);
        scored += hits.size();
    });
    return done ? scored.load() : NO_MEMORY;
}

// The same for so few queries that scoring every row in float64 is quicker than packing it.
int64_t plumbline_search_few(const void* values, int values_are_half, const double* row_norms, const int64_t* ranks,
                             int64_t num_rows, const float* queries, const double* query_norms, int64_t num_queries,
                             int64_t dimension, int64_t k, int threads, int64_t* keys) {
    Stored stored{values, dimension, bool(values_are_half)};
    std::vector<std::vector<int64_t>> best(threads * num_queries);
    bool done = in_threads(threads, threads, [&](int64_t part) {
        auto row_values = buffer<float>(dimension);
        auto terms = buffer<double>(dimension);
        std::vector<int64_t> floors(num_queries);
        for (int64_t query = 0; query < num_queries; query++) floors[query] = keys[query * k + k - 1];
        for (int64_t row = num_rows * part / threads; row < num_rows * (part + 1) / threads; row++) {
            stored.read(row, row_values.get());
            for (int64_t query = 0; query < num_queries; query++) {
                double dot = product(queries + query * dimension, row_values.get(), dimension, terms.get());
                int64_t key = key_of(dot, query_norms[query] * row_norms[row], ranks[row]);
                auto& found = best[part * num_queries + query];
                if (key <= floors[query]) continue;
                found.push_back(key);
                if (int64_t(found.size()) < 4 * k) continue;
                std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<int64_t>());
                found.resize(k);
                floors[query] = std::max(floors[query], found[k - 1]);
            }
        }
    });
    for (int64_t query = 0; query < num_queries; query++)
        for (int64_t part = 0; part < threads; part++) merge(keys + query * k, k, best[part * num_queries + query]);
    return done ? num_rows * num_queries : NO_MEMORY;
}
}
