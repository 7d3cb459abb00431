// The exact search's inner loops for x86: products in low precision, selection while they are in the nearest cache,
// float64 scores of what could still be among the first k. native.py compiles and calls it; native_kernel.py says why
// nothing is lost; score.py defines a score, bit by bit.
//
// One build holds what one kind of processor can do, chosen by the compiler's flags: AVX2, AVX-512, AVX-512 with bytes
// (VNNI), with bfloat16, AMX. Arithmetic that must give the same bits everywhere is written in plain C++ and built without
// contraction (-ffp-contract=off).
//
// Layout. A number is float32, bfloat16 or a byte; a group is 32 bits of consecutive components of one vector: one
// float32, two bfloat16 or four bytes. A tile is 16 rows x 16 groups = 1 KiB; a step is 16 groups of the dimension, which is padded with zeros.
//   rows:    [N / 16][steps] tiles, each [row][group]
//   panels:  [Q / 64][steps][4] tiles, each [group][query]: 64 queries side by side
//   sums:    [4][row][query] float32: the products of 16 rows with a panel

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <system_error>
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
constexpr int64_t NO_HIT = INT64_MIN;              // score.py: the key of an empty place
constexpr int64_t BATCH = 64;                      // rows that are scored before their query's k-th best is known anew
constexpr int64_t AHEAD = 4;                       // rows that are fetched from memory meanwhile
constexpr int64_t TOO_MANY = -1, NO_MEMORY = -2;

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

// `work(number)` for every number below `count`, on so many threads.
template <class Work>
void in_threads(int threads, int64_t count, const Work& work) {
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
    try {
        for (int64_t number = 1; number < std::min<int64_t>(threads, count); number++) others.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads to be had: fewer do the work
    }
    run();
    for (auto& other : others) other.join();
    if (failed) throw std::bad_alloc();
}

// Sixteen lanes at once, in whatever registers there are.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Octets __attribute__((vector_size(16)));

Floats floats_at(const float* place) {
    Floats sixteen;
    std::memcpy(&sixteen, place, sizeof sixteen);
    return sixteen;
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

    // The row as float32: where it lies, or in `scratch`.
    const float* floats(int64_t number, float* scratch) const {
        if (!is_half) return reinterpret_cast<const float*>(row(number));
        read(number, scratch);
        return scratch;
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

// The same in float32, off by less than (D / 32 + 20) 2^-24 of the product of the norms where that is a plain number.
float rough_product(const float* left, const float* right, int64_t dimension) {
    Floats sums{}, more{};
    int64_t place = 0;
    for (; place + 2 * SIDE <= dimension; place += 2 * SIDE) {
        sums += floats_at(left + place) * floats_at(right + place);
        more += floats_at(left + place + SIDE) * floats_at(right + place + SIDE);
    }
    float sum = 0;
    for (; place < dimension; place++) sum += left[place] * right[place];
    sums += more;
    for (int64_t lane = 0; lane < SIDE; lane++) sum += sums[lane];
    return sum;
}

int64_t key_of(double dot, double scale, int64_t rank) {
    float score = (scale > 0 ? float(dot / scale) : 0.0f) + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    int32_t ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    return int64_t(uint64_t(int64_t(ordered)) << 32) + (RANKS - rank);
}

double score_of(int64_t key) {
    int32_t ordered = int32_t(key >> 32), bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF);
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
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
    static Words round(Floats values) { return (Words)values; }
    static void write(Words rounded, char* to) { std::memcpy(to, &rounded, sizeof rounded); }
};

struct BFloat16 {
    static constexpr int64_t PER_GROUP = 2;
    static Words round(Floats values) {  // to nearest, ties to even, as float32; every value here is finite
        Words bits = (Words)values;
        return (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
    }
    static void write(Words rounded, char* to) {
        Halves upper = __builtin_convertvector(rounded >> 16, Halves);
        std::memcpy(to, &upper, sizeof upper);
    }
};

// A component in steps of its vector's own, from -127 to 127; rows are stored 128 higher, as the instruction wants them.
struct Byte {
    static constexpr int64_t PER_GROUP = 4;
    static constexpr float LARGEST = 127;
    static constexpr int32_t OFFSET = 128;
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
#if defined(__AVX512VNNI__)
    if (Number::PER_GROUP == 4)
        return _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sums), left, right));
#endif
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
#else
bool ask_for_tiles() { return true; }
void open_tiles() {}
#endif

// ---- the pass over a window

// The product of a row with a query lies between these two, but for the query's own error.
struct Hit {
    float lowest, highest;
    uint32_t row;
};

// What is kept of one query while rows go by.
struct Kept {
    std::vector<Hit> hits;
    size_t room;
};

// A row as bytes: what one is worth, the norm of what rounding took, and the component along the direction that was
// left out of them.
struct RowFacts {
    float step, lost, along;
};

// The same of queries, each [Q, padded to a panel], with the norm of what became bytes, and OFFSET times their sum.
struct QueryFacts {
    float *step, *lost, *along, *norm;
    int32_t* sum;

    QueryFacts(float* facts, int64_t num_queries) {
        int64_t padded = (num_queries + PANEL - 1) / PANEL * PANEL;
        step = facts, lost = facts + padded, along = facts + 2 * padded, norm = facts + 3 * padded;
        sum = reinterpret_cast<int32_t*>(facts + 4 * padded);
    }
};

struct Search {
    const char* rows;
    const char* panels;
    const RowFacts* row_facts;  // of bytes, or null
    QueryFacts query_facts;
    const float* margins;   // [Q]: a product this far below the k-th best cannot belong to the first k
    const float* earlier;   // [Q, k]: products that the hits of earlier windows stand for, -inf for none
    const double* shifts;   // [Q]: no score is above its product plus this
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
                     [](const Hit& left, const Hit& right) { return left.lowest > right.lowest; });
    float kth = hits[k - 1].lowest;
    if (kth == LOWEST) return LOWEST;
    float floor = floor_below(kth, margin);
    hits.erase(std::remove_if(hits.begin(), hits.end(), [&](const Hit& hit) { return hit.highest < floor; }),
               hits.end());
    return floor;
}

// Sums of bytes become the highest products that they may stand for.
void raise_sums(float* sums, const Search& search, int64_t panel, int64_t first) {
    const QueryFacts& queries = search.query_facts;
    for (int64_t query = panel * PANEL; query < (panel + 1) * PANEL; query += SIDE)
        for (int64_t row = 0; row < SIDE; row++, sums += SIDE) {
            RowFacts facts = search.row_facts[first + row];
            Integers taken;
            std::memcpy(&taken, queries.sum + query, sizeof taken);
            Floats products = __builtin_convertvector((Integers)floats_at(sums) - taken, Floats);
            products = products * floats_at(queries.step + query) * facts.step +
                       floats_at(queries.along + query) * facts.along + floats_at(queries.norm + query) * facts.lost;
            std::memcpy(sums, &products, sizeof products);
        }
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
                if (std::isfinite(earlier[number]))
                    kept[place].hits.push_back({earlier[number], earlier[number], NO_ROW});
            floors[place] = prune(kept[place].hits, search.k, search.margins[first + place]);
        }
    }

    void keep(Search& search, int64_t place, float highest, int64_t row) {
        Kept& query = kept[place];
        int64_t number = first_panel * PANEL + place;
        float spread = search.row_facts ? 2 * search.row_facts[row].lost * search.query_facts.norm[number] : 0;
        query.hits.push_back({highest - spread, highest, uint32_t(row)});
        if (query.hits.size() < query.room) return;
        floors[place] = prune(query.hits, search.k, search.margins[number]);
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
                        if (step + count < search.steps) continue;
                        if (search.row_facts) raise_sums(now, search, panel, row);
                        select(search, now, panel, row);
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

float norm(Floats squares) {
    float sum = 0;
    for (int64_t lane = 0; lane < SIDE; lane++) sum += squares[lane];
    return std::sqrt(sum);
}

// Writes a row into its tile. Returns its norm and that of what rounding took from it, in float32: each is off by less
// than (D + 2) 2^-24 of itself.
template <class Number>
std::pair<float, float> pack_row(const float* centred, int64_t row, int64_t steps, char* packed) {
    char* tiles = packed + row / SIDE * steps * TILE + row % SIDE * LINE;
    Floats squares{}, lost_squares{};
    for (int64_t step = 0; step < steps; step++)
        for (int64_t part = 0; part < Number::PER_GROUP; part++, centred += SIDE) {
            Floats values = floats_at(centred);
            Words rounded = Number::round(values);
            Floats lost = values - (Floats)rounded;
            squares += values * values;
            lost_squares += lost * lost;
            Number::write(rounded, tiles + step * TILE + part * LINE / Number::PER_GROUP);
        }
    return {norm(squares), norm(lost_squares)};
}

void raise(std::atomic<float>& highest, float value) {
    float seen = highest.load();
    while (value > seen && !highest.compare_exchange_weak(seen, value)) {
    }
}

constexpr int64_t ROWS_AT_ONCE = 256;

// A row as it was stored -> its unit vector minus the mean.
void centre(float* values, int64_t dimension, double length, const float* mean) {
    if (length > 1e-20 && length < 1e20) {
        float scale = float(1.0 / length);
        for (int64_t place = 0; place < dimension; place++) values[place] = values[place] * scale - mean[place];
    } else {  // a float32 reciprocal would overflow or lose bits; a zero vector stays zero
        for (int64_t place = 0; place < dimension; place++)
            values[place] = float(double(values[place]) / (length > 0 ? length : 1.0) - double(mean[place]));
    }
}

template <class Number>
void pack_rows(Stored stored, int64_t num_rows, const double* norms, const float* mean, int threads, char* packed,
               float* largest) {
    int64_t steps = steps_of<Number>(stored.dimension), padded = steps * SIDE * Number::PER_GROUP;
    std::atomic<float> largest_norm{0.0f}, largest_residual{0.0f};
    in_threads(threads, (num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int64_t part) {
        auto centred = buffer<float>(padded);
        for (int64_t row = part * ROWS_AT_ONCE; row < std::min((part + 1) * ROWS_AT_ONCE, num_rows); row++) {
            stored.read(row, centred.get());
            centre(centred.get(), stored.dimension, norms[row], mean);
            auto [whole, lost] = pack_row<Number>(centred.get(), row, steps, packed);
            raise(largest_norm, whole);
            raise(largest_residual, lost);
        }
    });
    std::vector<float> nothing(padded);
    for (int64_t row = num_rows; row % SIDE; row++) pack_row<Number>(nothing.data(), row, steps, packed);
    largest[0] = largest_norm, largest[1] = largest_residual;
}

// Four tiles of queries, packed as rows are -> a panel.
void transpose(const char* rows, int64_t steps, char* panel) {
    for (int64_t tile = 0; tile < 4; tile++)
        for (int64_t step = 0; step < steps; step++) {
            const char* from = rows + (tile * steps + step) * TILE;
            char* to = panel + (step * 4 + tile) * TILE;
            for (int64_t query = 0; query < SIDE; query++)
                for (int64_t group = 0; group < SIDE; group++)
                    std::memcpy(to + group * LINE + query * 4, from + query * LINE + group * 4, 4);
        }
}

template <class Number>
void pack_panels(const float* queries, int64_t num_queries, int64_t dimension, int threads, char* panels) {
    int64_t steps = steps_of<Number>(dimension), padded = steps * SIDE * Number::PER_GROUP;
    in_threads(threads, (num_queries + PANEL - 1) / PANEL, [&](int64_t panel) {
        auto centred = buffer<float>(padded);
        auto rows = buffer<char>(4 * steps * TILE);  // the queries as rows are packed; their tiles are then transposed
        for (int64_t query = panel * PANEL; query < std::min((panel + 1) * PANEL, num_queries); query++) {
            std::copy(queries + query * dimension, queries + (query + 1) * dimension, centred.get());
            pack_row<Number>(centred.get(), query % PANEL, steps, rows.get());
        }
        transpose(rows.get(), steps, panels + panel * steps * 4 * TILE);
    });
}

#if defined(__AVX512VNNI__)
// Turns vectors so that no component stands out, which their steps would be too wide for: signs that look random, then
// a Hadamard matrix over every `block` components. A product of two vectors that are turned is what it was.
struct Turn {
    int64_t padded, block;
    Buffer<float> signs;  // over the square root of the block, so that no length changes

    explicit Turn(int64_t steps) : padded(steps * LINE), block(padded & -padded), signs(buffer<float>(padded)) {
        uint32_t state = 1;
        for (int64_t place = 0; place < padded; place++) {
            state = state * 1664525u + 1013904223u;
            signs[place] = (state >> 31 ? -1.0f : 1.0f) / std::sqrt(float(block));
        }
    }

    void operator()(float* values) const {
        __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int64_t place = 0; place < padded; place += SIDE) {
            __m512 sixteen = _mm512_mul_ps(_mm512_load_ps(values + place), _mm512_load_ps(&signs[place]));
            for (int distance = 1; distance < SIDE; distance *= 2) {
                __m512i bit = _mm512_set1_epi32(distance);
                __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lanes, bit), sixteen);
                __m512 negative = _mm512_sub_ps(other, sixteen);
                sixteen = _mm512_mask_mov_ps(_mm512_add_ps(other, sixteen), _mm512_test_epi32_mask(lanes, bit), negative);
            }
            _mm512_store_ps(values + place, sixteen);
        }
        for (int64_t distance = SIDE; distance < block; distance *= 2)
            for (int64_t start = 0; start < padded; start += 2 * distance)
                for (int64_t place = start; place < start + distance; place++) {
                    float left = values[place], right = values[place + distance];
                    values[place] = left + right;
                    values[place + distance] = left - right;
                }
    }
};

// Takes away a vector's component along a direction of norm 1, and returns it.
float take_along(float* values, const float* direction, int64_t dimension) {
    float along = rough_product(values, direction, dimension);
    for (int64_t place = 0; place < dimension; place++) values[place] -= along * direction[place];
    return along;
}

struct Rounded {
    float step, norm, lost;  // the norms of the vector and of what rounding took from it, as pack_row gives them
    int32_t sum;             // of the bytes
};

// Writes a vector into its tile.
Rounded pack_bytes(const float* values, int64_t row, int64_t steps, int32_t offset, char* packed) {
    char* tiles = packed + row / SIDE * steps * TILE + row % SIDE * LINE;
    Floats highest{};
    for (int64_t place = 0; place < steps * LINE; place += SIDE) {
        Floats sixteen = floats_at(values + place);
        highest = sixteen > highest ? sixteen : highest;
        highest = -sixteen > highest ? -sixteen : highest;
    }
    float largest = 0;
    for (int64_t lane = 0; lane < SIDE; lane++) largest = std::max(largest, highest[lane]);
    if (largest < 1e-30f) largest = std::numeric_limits<float>::infinity();  // nothing is kept of it: all is lost
    float per_step = Byte::LARGEST / largest, step = std::isinf(largest) ? 0.0f : largest / Byte::LARGEST;
    Floats squares{}, lost_squares{};
    Words sums{};
    for (int64_t number = 0; number < steps; number++)
        for (int64_t part = 0; part < Byte::PER_GROUP; part++, values += SIDE) {
            Floats sixteen = floats_at(values);
            Floats whole = (sixteen * per_step + 0x1.8p23f) - 0x1.8p23f;  // to the nearest
            Floats lost = sixteen - whole * step;
            squares += sixteen * sixteen;
            lost_squares += lost * lost;
            Words levels = (Words)__builtin_convertvector(whole, Integers);
            sums += levels;
            Octets octets = __builtin_convertvector(levels + uint32_t(offset), Octets);
            std::memcpy(tiles + number * TILE + part * SIDE, &octets, sizeof octets);
        }
    int32_t sum = 0;
    for (int64_t lane = 0; lane < SIDE; lane++) sum += int32_t(sums[lane]);
    return {step, norm(squares), norm(lost_squares), sum};
}

void pack_byte_rows(Stored stored, int64_t num_rows, const double* norms, const float* mean, int threads, char* packed,
                    const float* direction, RowFacts* facts, float* largest) {
    int64_t steps = steps_of<Byte>(stored.dimension);
    Turn turn(steps);
    std::atomic<float> largest_norm{0.0f}, largest_residual{0.0f};
    in_threads(threads, (num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int64_t part) {
        auto values = buffer<float>(turn.padded);
        for (int64_t row = part * ROWS_AT_ONCE; row < std::min((part + 1) * ROWS_AT_ONCE, num_rows); row++) {
            std::fill(values.get() + stored.dimension, values.get() + turn.padded, 0.0f);
            stored.read(row, values.get());
            centre(values.get(), stored.dimension, norms[row], mean);
            float along = take_along(values.get(), direction, stored.dimension);
            turn(values.get());
            Rounded rounded = pack_bytes(values.get(), row, steps, Byte::OFFSET, packed);
            facts[row] = {rounded.step, rounded.lost, along};
            raise(largest_norm, rounded.norm + std::abs(along));
            raise(largest_residual, rounded.lost);
        }
    });
    std::vector<float> nothing(turn.padded);
    for (int64_t row = num_rows; row % SIDE; row++) {
        pack_bytes(nothing.data(), row, steps, Byte::OFFSET, packed);
        facts[row] = {};
    }
    largest[0] = largest_norm, largest[1] = largest_residual;
}

void pack_byte_panels(const float* queries, int64_t num_queries, int64_t dimension, const float* direction, int threads,
                      char* panels, QueryFacts facts) {
    int64_t steps = steps_of<Byte>(dimension);
    Turn turn(steps);
    in_threads(threads, (num_queries + PANEL - 1) / PANEL, [&](int64_t panel) {
        auto values = buffer<float>(turn.padded);
        auto rows = buffer<char>(4 * steps * TILE);
        for (int64_t query = panel * PANEL; query < std::min((panel + 1) * PANEL, num_queries); query++) {
            std::fill(values.get() + dimension, values.get() + turn.padded, 0.0f);
            std::copy(queries + query * dimension, queries + (query + 1) * dimension, values.get());
            facts.along[query] = take_along(values.get(), direction, dimension);
            turn(values.get());
            Rounded rounded = pack_bytes(values.get(), query % PANEL, steps, 0, rows.get());
            facts.step[query] = rounded.step, facts.lost[query] = rounded.lost, facts.norm[query] = rounded.norm;
            facts.sum[query] = Byte::OFFSET * rounded.sum;
        }
        transpose(rows.get(), steps, panels + panel * steps * 4 * TILE);
    });
}
#endif

void norms_of(Stored stored, int64_t num_rows, int threads, double* norms) {
    in_threads(threads, (num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int64_t part) {
        auto values = buffer<float>(stored.dimension);
        auto terms = buffer<double>(stored.dimension);
        for (int64_t row = part * ROWS_AT_ONCE; row < std::min((part + 1) * ROWS_AT_ONCE, num_rows); row++) {
            stored.read(row, values.get());
            norms[row] = std::sqrt(product(values.get(), values.get(), stored.dimension, terms.get()));
        }
    });
}

void sum_of_units(Stored stored, int64_t num_rows, const double* norms, double grains, int threads, double* total) {
    std::vector<Buffer<double>> sums(threads);
    in_threads(threads, threads, [&](int64_t part) {
        sums[part] = buffer<double>(stored.dimension);
        double* sum = sums[part].get();
        auto values = buffer<float>(stored.dimension);
        for (int64_t row = num_rows * part / threads; row < num_rows * (part + 1) / threads; row++) {
            double norm = norms[row];
            if (!(norm > 0)) continue;
            stored.read(row, values.get());
            for (int64_t place = 0; place < stored.dimension; place++)  // 1.5 x 2^52 added and taken: rounds, ties to even
                sum[place] += (double(values[place]) / norm * grains + 0x1.8p52) - 0x1.8p52;
        }
    });
    for (const auto& sum : sums)
        for (int64_t place = 0; place < stored.dimension; place++) total[place] += sum[place];
}

// Queries or rows with the norms of their stored vectors.
struct Normed {
    Stored stored;
    const double* norms;
};

// Scores what was kept of one query.
struct Settled {
    const Search& search;
    Normed rows, queries;
    const int64_t* ranks;
    int64_t query, *best;
    Buffer<float> values, scratch;
    Buffer<double> terms;
    std::vector<int64_t> fresh;

    Settled(const Search& search, Normed rows, const int64_t* ranks, Normed queries, int64_t query, int64_t* best)
        : search(search), rows(rows), queries(queries), ranks(ranks), query(query), best(best),
          values(buffer<float>(rows.stored.dimension)), scratch(buffer<float>(rows.stored.dimension)),
          terms(buffer<double>(rows.stored.dimension)) {
        queries.stored.read(query, values.get());
    }

    double kth() const {
        return best[search.k - 1] == NO_HIT ? -std::numeric_limits<double>::infinity() : score_of(best[search.k - 1]);
    }

    // A float32 product tells most rows from those that need a float64 one.
    void add(int64_t row, double kth) {
        int64_t dimension = rows.stored.dimension;
        const float* right = rows.stored.floats(row, scratch.get());
        double scale = queries.norms[query] * rows.norms[row];
        if (scale > 1e-25 && scale < 1e25) {
            double rough = rough_product(values.get(), right, dimension) / scale;
            if (rough + double(dimension / 32 + 24) * 0x1p-24 < kth) return;
        }
        fresh.push_back(key_of(product(values.get(), right, dimension, terms.get()), scale, ranks[row]));
    }

    void prefetch(int64_t row) const {
        __builtin_prefetch(rows.norms + row);
        rows.stored.prefetch(row);
    }

    // The most promising first, until none is left that could reach the k-th best score; how many that were.
    int64_t score(std::vector<Hit> hits) {
        std::sort(hits.begin(), hits.end(),
                  [](const Hit& left, const Hit& right) { return left.highest > right.highest; });
        size_t number = 0;
        for (size_t stop = 0; number == stop && stop < hits.size();) {
            double least = kth();
            stop = std::min<size_t>(stop + std::max<int64_t>(search.k, BATCH), hits.size());
            for (; number < stop && hits[number].highest >= least - search.shifts[query]; number++) {
                if (number + AHEAD < hits.size()) prefetch(hits[number + AHEAD].row);
                add(hits[number].row, least);
            }
            merge(best, search.k, fresh);
            fresh.clear();
        }
        return number;
    }
};

// Scores of what the items kept, merged into the keys; returns how many.
int64_t settle(const Search& search, std::vector<Item>& items, Normed rows, const int64_t* ranks, Normed queries,
               int threads, int64_t* keys) {
    std::atomic<int64_t> scored{0};
    in_threads(threads, search.num_queries, [&](int64_t query) {
        Settled settled(search, rows, ranks, queries, query, keys + query * search.k);
        scored += settled.score(kept_of(items, search, query));
    });
    return scored;
}

// For a few queries: the score of every row, in float64.
void search_all(Normed rows, const int64_t* ranks, int64_t num_rows, Normed queries, int64_t num_queries, int64_t k,
                int threads, int64_t* keys) {
    int64_t dimension = rows.stored.dimension;
    auto query_values = buffer<float>(num_queries * dimension);
    for (int64_t query = 0; query < num_queries; query++)
        queries.stored.read(query, query_values.get() + query * dimension);
    std::vector<std::vector<int64_t>> best(threads * num_queries);
    in_threads(threads, threads, [&](int64_t part) {
        auto values = buffer<float>(dimension);
        auto terms = buffer<double>(dimension);
        std::vector<int64_t> floors(num_queries);
        for (int64_t query = 0; query < num_queries; query++) floors[query] = keys[query * k + k - 1];
        for (int64_t row = num_rows * part / threads; row < num_rows * (part + 1) / threads; row++) {
            rows.stored.read(row, values.get());
            for (int64_t query = 0; query < num_queries; query++) {
                double dot = product(query_values.get() + query * dimension, values.get(), dimension, terms.get());
                int64_t key = key_of(dot, queries.norms[query] * rows.norms[row], ranks[row]);
                if (key <= floors[query]) continue;
                auto& found = best[part * num_queries + query];
                found.push_back(key);
                if (int64_t(found.size()) < 4 * k) continue;
                std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<int64_t>());
                found.resize(k);
                floors[query] = std::max(floors[query], found[k - 1]);
            }
        }
    });
    for (size_t number = 0; number < best.size(); number++) merge(keys + number % num_queries * k, k, best[number]);
}

enum Kind { FLOAT32, BFLOAT16, BYTES };

int64_t steps_of_kind(int kind, int64_t dimension) {
    return kind == BYTES      ? steps_of<Byte>(dimension)
           : kind == BFLOAT16 ? steps_of<BFloat16>(dimension)
                              : steps_of<Float32>(dimension);
}

template <class Body>
int64_t guarded(const Body& body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

}  // namespace

// Arrays are C-contiguous; `is_half` says float16 or float32; `kind` says what numbers the pass takes: 0 float32,
// 1 bfloat16, 2 bytes. The dimension D is that of the stored vectors. Every function returns 0 or more, or NO_MEMORY.
extern "C" {

// To be called once, before anything else; not 0 if the system does not let us use what this was built for.
int64_t plumbline_start() { return ask_for_tiles() ? 0 : 1; }

// norms [N]: Euclidean norms in float64, not finite exactly where a row holds NaN or infinity.
int64_t plumbline_norms(const void* values, int is_half, int64_t num_rows, int64_t dimension, int threads,
                        double* norms) {
    return guarded([&] {
        norms_of({values, dimension, bool(is_half)}, num_rows, threads, norms);
        return int64_t{0};
    });
}

// total [D]: the sum of the unit vectors in grains of 1 / `grains`, each component rounded to one: exact, in any order.
int64_t plumbline_sum_of_units(const void* values, int is_half, int64_t num_rows, int64_t dimension,
                               const double* norms, double grains, int threads, double* total) {
    return guarded([&] {
        sum_of_units({values, dimension, bool(is_half)}, num_rows, norms, grains, threads, total);
        return int64_t{0};
    });
}

// Bytes of a packed vector: rows are packed in sixteens, queries in panels of 64.
int64_t plumbline_packed_bytes(int64_t dimension, int kind) { return steps_of_kind(kind, dimension) * LINE; }

// packed: unit vectors minus the mean; largest [2]: the largest norm of them, and of what rounding took. Bytes leave out
// the component along `direction` [D], of norm 1 or 0, and have facts [N padded to sixteens, 3], as RowFacts.
int64_t plumbline_pack_rows(const void* values, int is_half, int64_t num_rows, int64_t dimension, const double* norms,
                            const float* mean, const float* direction, int kind, int threads, char* packed,
                            void* facts, float* largest) {
    return guarded([&] {
        Stored stored{values, dimension, bool(is_half)};
#if defined(__AVX512VNNI__)
        if (kind == BYTES) {
            auto row_facts = static_cast<RowFacts*>(facts);
            pack_byte_rows(stored, num_rows, norms, mean, threads, packed, direction, row_facts, largest);
            return int64_t{0};
        }
#endif
        auto pack = kind == BFLOAT16 ? pack_rows<BFloat16> : pack_rows<Float32>;
        pack(stored, num_rows, norms, mean, threads, packed, largest);
        return int64_t{0};
    });
}

// panels: queries in float32, exact in the precision of the pass but for bytes, of which facts [5, Q padded to panels]
// become QueryFacts; they are zeros before.
int64_t plumbline_pack_panels(const float* queries, int64_t num_queries, int64_t dimension, const float* direction,
                              int kind, int threads, char* panels, float* facts) {
    return guarded([&] {
#if defined(__AVX512VNNI__)
        if (kind == BYTES) {
            QueryFacts query_facts(facts, num_queries);
            pack_byte_panels(queries, num_queries, dimension, direction, threads, panels, query_facts);
            return int64_t{0};
        }
#endif
        auto pack = kind == BFLOAT16 ? pack_panels<BFloat16> : pack_panels<Float32>;
        pack(queries, num_queries, dimension, threads, panels);
        return int64_t{0};
    });
}

// Searches packed rows for a block of queries and merges what it finds into keys [Q, k]. Returns how many pairs were
// scored in float64, or TOO_MANY, with no key changed, if more than `spare` hits had to be held.
int64_t plumbline_search(const char* packed, const void* row_facts, const char* panels, float* query_facts, int kind,
                         const float* margins, const float* earlier, const double* shifts, const void* rows, int rows_are_half,
                         const double* row_norms, const int64_t* ranks, int64_t num_rows, const void* queries,
                         int queries_are_half, const double* query_norms, int64_t num_queries, int64_t dimension,
                         int64_t k, int64_t spare, int threads, int64_t* keys) {
    return guarded([&] {
        auto facts = kind == BYTES ? static_cast<const RowFacts*>(row_facts) : nullptr;
        int64_t steps = steps_of_kind(kind, dimension);
        Search search{packed, panels, facts, {query_facts, num_queries}, margins, earlier, shifts,
                      num_rows, num_queries, k, steps, {spare}};
        auto items = items_of(search, threads);
        auto scan = kind == BYTES ? &Item::scan<Byte> : kind == BFLOAT16 ? &Item::scan<BFloat16> : &Item::scan<Float32>;
        in_threads(threads, items.size(), [&](int64_t number) { (items[number].*scan)(search); });
        if (search.spare < 0) return TOO_MANY;
        return settle(search, items, {{rows, dimension, bool(rows_are_half)}, row_norms}, ranks,
                      {{queries, dimension, bool(queries_are_half)}, query_norms}, threads, keys);
    });
}

// The same for so few queries that scoring every row in float64 is quicker than packing it.
int64_t plumbline_search_few(const void* rows, int rows_are_half, const double* row_norms, const int64_t* ranks,
                             int64_t num_rows, const void* queries, int queries_are_half, const double* query_norms,
                             int64_t num_queries, int64_t dimension, int64_t k, int threads, int64_t* keys) {
    return guarded([&] {
        search_all({{rows, dimension, bool(rows_are_half)}, row_norms}, ranks, num_rows,
                   {{queries, dimension, bool(queries_are_half)}, query_norms}, num_queries, k, threads, keys);
        return num_rows * num_queries;
    });
}

}  // extern "C"
