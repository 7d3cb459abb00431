// Rows of identifiers: which stand in a row twice, and where those stand that were judged relevant for it? native.py
// compiles and calls this. Where it finds fault with a run it only says so; what is wrong is for judging.py to say.
//
// A column is an array of chunks, as Arrow holds strings: offsets into their bytes, and codes where there is a
// dictionary. A row is a stretch of a column, the hits of one query. Its strings go into a table with several slots for
// each, so that most stand alone and the table in the nearest cache. A hash only says where to look: strings are the
// same when their bytes are.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace {

constexpr int64_t FAULT = -1, NO_MEMORY = -2;
constexpr int64_t SLOTS_PER_STRING = 8;  // or up to twice as many: a power of two
constexpr int64_t AHEAD = 16;            // strings of a dictionary may lie anywhere in memory
constexpr int64_t WORD = 8;              // bytes

// Of the first bytes of a word, from the lowest: little-endian processors only.
constexpr uint64_t BYTES[WORD + 1] = {0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFF, 0xFFFFFFFFFFFF,
                                      0xFFFFFFFFFFFFFF, ~uint64_t{0}};

__attribute__((noinline)) uint64_t last_word(const char* start, int64_t length) {
    uint64_t word = 0;
    if (length > 0) std::memcpy(&word, start, std::min(length, WORD));
    return word;
}

// The first 8 bytes, or what there is of them and zeros; nothing is read from `end` on.
uint64_t word_at(const char* start, int64_t length, const char* end) {
    if (end - start < WORD) return last_word(start, length);
    uint64_t word;
    std::memcpy(&word, start, WORD);
    return word & BYTES[std::min(length, WORD)];
}

uint64_t hash_of(const char* start, int64_t length, const char* end, uint64_t factor) {
    uint64_t hash = length;
    do {
        unsigned __int128 product = static_cast<unsigned __int128>(hash ^ word_at(start, length, end)) * factor;
        hash = static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
        start += WORD;
        length -= WORD;
    } while (length > 0);
    return hash;
}

// As native.py fills it in.
struct Chunk {
    int64_t end;             // counted from the beginning of the column
    const int32_t* offsets;  // of strings
    const char* bytes;
    int64_t num_bytes;
    const char* codes;       // which of the strings stands at each place; nullptr: the one of the same number
    int64_t code_bytes;
    const uint64_t* hashes;  // of the strings, or nullptr

    template <class Number>
    int64_t code_as(int64_t place) const {
        Number code;
        std::memcpy(&code, codes + place * sizeof code, sizeof code);
        return static_cast<int64_t>(code);
    }

    int64_t number(int64_t place) const {
        if (!codes) return place;
        if (code_bytes == 4) return code_as<uint32_t>(place);
        if (code_bytes == 8) return code_as<int64_t>(place);
        return code_bytes == 2 ? code_as<uint16_t>(place) : code_as<uint8_t>(place);
    }

    const char* start(int64_t number) const { return bytes + offsets[number]; }
    int64_t length(int64_t number) const { return int64_t{offsets[number + 1]} - offsets[number]; }

    uint64_t hash(int64_t number, uint64_t factor) const {
        return hashes ? hashes[number] : hash_of(start(number), length(number), bytes + num_bytes, factor);
    }

    void prefetch(int64_t place) const {
        int64_t at = number(place);
        __builtin_prefetch(hashes ? static_cast<const void*>(hashes + at) : offsets + at);
    }
};

struct String {
    uint64_t hash;
    const Chunk* chunk;
    int64_t number;
};

bool is_same(const String& one, const String& other) {
    if (one.hash != other.hash) return false;
    int64_t length = one.chunk->length(one.number);
    return length == other.chunk->length(other.number) &&
           (length == 0 || !std::memcmp(one.chunk->start(one.number), other.chunk->start(other.number), length));
}

String string_at(const Chunk* chunk, int64_t place, uint64_t factor) {
    int64_t number = chunk->number(place);
    return {chunk->hash(number, factor), chunk, number};
}

// A column that is read from front to back, row by row.
class Reader {
public:
    Reader(const Chunk* chunks, uint64_t factor) : chunk(chunks), factor(factor) {}

    void read(int64_t first, int64_t last, std::vector<String>& strings) {
        strings.resize(last - first);
        String* next = strings.data();
        in_chunks(first, last, [&](int64_t from, int64_t upto) {
            for (int64_t place = from; place < upto; place++) {
                if (chunk->codes) chunk->prefetch(std::min(place + AHEAD, upto - 1));
                *next++ = string_at(chunk, place, factor);
            }
        });
    }

    // Whether all these are one string; false also where a dictionary holds it twice.
    bool is_one(int64_t first, int64_t last) {
        String one{};
        bool is_first = true, is_all = true;
        in_chunks(first, last, [&](int64_t from, int64_t upto) {
            String found = string_at(chunk, from, factor);
            is_all &= is_first || is_same(found, one);
            is_first = false;
            one = found;
            if (chunk->codes) {  // all equal: each equals the one before it
                const char* codes = chunk->codes + from * chunk->code_bytes;
                is_all &= !std::memcmp(codes, codes + chunk->code_bytes, (upto - from - 1) * chunk->code_bytes);
            }
            for (int64_t place = from + 1; !chunk->codes && place < upto; place++)
                is_all &= is_same(string_at(chunk, place, factor), one);
        });
        return is_all;
    }

private:
    // `visit(from, upto)` for every stretch in one chunk, counted from the beginning of that chunk.
    template <class Visit>
    void in_chunks(int64_t first, int64_t last, const Visit& visit) {
        while (first < last) {
            for (; chunk->end <= first; chunk++) begin = chunk->end;
            int64_t upto = std::min(last, chunk->end);
            visit(first - begin, upto - begin);
            first = upto;
        }
    }

    const Chunk* chunk;
    int64_t begin = 0;
    uint64_t factor;
};

// The strings of one row by their hashes. A slot holds the number of the string that filled it, counted from 1 over all
// rows: where that is not above the count at the beginning of the row the slot is empty, and nothing is ever cleared.
class Table {
public:
    explicit Table(int64_t longest) {
        while (int64_t{1} << bits < SLOTS_PER_STRING * longest) bits++;
        slots.resize(int64_t{1} << bits);
    }

    // False if a string stands in the row twice. The row is looked at again by `place_of`.
    bool fill(const std::vector<String>& strings) {
        row = strings.data();
        before = count;
        for (const String& string : strings) {
            int64_t& slot = slots[slot_of(string)];
            if (slot > before) return false;
            slot = ++count;
        }
        return true;
    }

    // Of an equal string in the row, or -1.
    int64_t place_of(const String& string) const {
        return std::max<int64_t>(slots[slot_of(string)] - before, 0) - 1;
    }

private:
    // The slot of an equal string, or the empty one that it would fill.
    size_t slot_of(const String& string) const {
        size_t slot = string.hash >> (64 - bits);
        while (slots[slot] > before && !is_same(row[slots[slot] - before - 1], string))
            slot = (slot + 1) & (slots.size() - 1);
        return slot;
    }

    int bits = 1;
    int64_t before = 0, count = 0;
    const String* row = nullptr;
    std::vector<int64_t> slots;
};

bool is_ranked(const int32_t* ranks, int32_t count) {
    int32_t difference = 0;
    for (int32_t place = 0; place < count; place++) difference |= ranks[place] ^ (place + 1);
    return !difference;
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

// A column comes as its chunks, the last of which ends behind all that is asked for. Results are counts, or FAULT, or
// NO_MEMORY. `factor` makes the hashes: a large odd number makes good ones.
extern "C" {

int64_t plumbline_hashes(const Chunk* strings, int64_t count, uint64_t factor, uint64_t* hashes) {
    for (int64_t place = 0; place < count; place++) hashes[place] = strings->hash(place, factor);
    return count;
}

// The judged candidates first_judged[row], ... in the rows that begin at edges[row] and end at the next one: (hit,
// judged candidate) of each that is found, in order of the hits, into arrays that have room for all.
// FAULT: a candidate stands in its row twice, a row has several queries, or its ranks are not 1, 2, 3, ...; without
// `ranks` neither they nor queries are looked at.
int64_t plumbline_match(const Chunk* candidates, const Chunk* queries, const int32_t* ranks, const int64_t* edges,
                        int64_t num_rows, const Chunk* judged, const int64_t* first_judged, const int64_t* num_judged,
                        uint64_t factor, int64_t* hits, int64_t* found) {
    return guarded([&] {
        int64_t longest = 0, count = 0;
        for (int64_t row = 0; row < num_rows; row++) longest = std::max(longest, edges[row + 1] - edges[row]);
        Reader candidate(candidates, factor), query(queries, factor);
        Table table(longest);
        std::vector<String> strings;
        std::vector<std::pair<int64_t, int64_t>> pairs;
        for (int64_t row = 0; row < num_rows; row++) {
            int64_t first = edges[row], last = edges[row + 1];
            if (ranks && !(is_ranked(ranks + first, last - first) && query.is_one(first, last))) return FAULT;
            candidate.read(first, last, strings);
            if (!table.fill(strings)) return FAULT;
            pairs.clear();
            for (int64_t number = 0; number < num_judged[row]; number++) {
                int64_t place = table.place_of(string_at(judged, first_judged[row] + number, factor));
                if (place >= 0) pairs.emplace_back(first + place, first_judged[row] + number);
            }
            std::sort(pairs.begin(), pairs.end());
            for (auto [hit, number] : pairs) {
                hits[count] = hit;
                found[count++] = number;
            }
        }
        return count;
    });
}

}  // extern "C"
