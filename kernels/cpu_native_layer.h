// Rows sorted by expert, one packed linear for all of them, and what lies between the two linears of a layer.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu_native_tiles.h"

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using Memory = std::unique_ptr<T[], Free>;

template <typename T>
Memory<T> allocate(int64_t count) {
    return Memory<T>(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T) + 1, 64))));
}

// Rows that share an expert: `first` up to `first + rows` in the order of the plan.
struct Block {
    int64_t expert, first, rows;
};

// Rows in the order of their experts; those of no expert are in no block.
struct Plan {
    std::vector<int64_t> order;  // the row at each place
    std::vector<int64_t> place;  // of each row, -1 for those of no expert
    std::vector<Block> blocks;

    Plan(const int64_t* ids, int64_t rows, int64_t experts) : place(rows, -1) {
        std::vector<int64_t> begin(experts + 1, 0);
        const auto known = [&](int64_t r) { return ids[r] >= 0 && ids[r] < experts; };
        for (int64_t r = 0; r < rows; ++r)
            if (known(r)) ++begin[ids[r] + 1];
        for (int64_t expert = 0; expert < experts; ++expert) {
            for (int64_t row = 0; row < begin[expert + 1]; row += MAX_ROWS) {
                const int64_t left = begin[expert + 1] - row;
                blocks.push_back({expert, begin[expert] + row, left < MAX_ROWS ? left : MAX_ROWS});
            }
            begin[expert + 1] += begin[expert];
        }
        order.resize(begin[experts]);
        for (int64_t r = 0; r < rows; ++r) {
            if (!known(r)) continue;
            place[r] = begin[ids[r]]++;
            order[place[r]] = r;
        }
    }

    int64_t rows() const { return static_cast<int64_t>(order.size()); }
};

// Rows of `x` from which on the tile registers are faster than vectors.
constexpr int64_t MIN_TILE_ROWS = 2;

// Calls `function` with the number of planes as a constant.
template <typename Function>
void with_planes(int planes, const Function& function) {
    switch (planes) {
        case 1: return function(std::integral_constant<int, 1>());
        case 2: return function(std::integral_constant<int, 2>());
        case 3: return function(std::integral_constant<int, 3>());
        default: return function(std::integral_constant<int, 4>());
    }
}

// One packed linear for the rows of a plan. Its methods are called by all threads of a team.
class Product {
public:
    // `source[p]` is the row of the inputs that place `p` of the plan reads.
    Product(const Linear& linear, const Plan& plan, int64_t num_inputs, std::vector<int64_t> source, bool tiles)
        : w(linear),
          plan(plan),
          num_inputs(num_inputs),
          source(std::move(source)),
          slot_begin(plan.rows() + 1, 0),
          limbs(allocate<int8_t>(num_inputs * w.tiles() * Input::TILE_BYTES)),
          unit(allocate<float>(num_inputs)),
          sums(allocate<float>(num_inputs * round_up(w.groups, 8))),
          result(allocate<float>(plan.rows() * w.out_features)) {
        for (const Block& block : plan.blocks) {
            work += cost(block) * chunks();
            for (int64_t p = block.first; p < block.first + block.rows; ++p)
                slot_begin[p + 1] = slot_begin[p] + w.slots(block.expert);
        }
        slots = allocate<float>(slot_begin.back());
        int64_t size = 0;
        for (const Block& block : plan.blocks) {
            column_begin.push_back(tiles && block.rows >= MIN_TILE_ROWS ? size : -1);
            if (column_begin.back() >= 0) size += columns_size(w, block.rows);
        }
        if (size) columns = allocate<int8_t>(size);
    }

    // The inputs' rows as integers, and what the pools' slots take from them: `x(r)` is row `r`.
    template <typename Rows>
    void prepare(const Rows& x) {
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < num_inputs; ++r) prepare_row(x(r), w, r, input());
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < static_cast<int64_t>(plan.blocks.size()); ++number) {
            const Block& block = plan.blocks[number];
            for (int64_t p = block.first; p < block.first + block.rows; ++p)
                prepare_slots(x(source[p]), w, block.expert, &slots[slot_begin[p]]);
        }
        if (!columns) return;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < static_cast<int64_t>(plan.blocks.size()); ++block)
            if (column_begin[block] >= 0)
                write_columns(w, input(), &source[plan.blocks[block].first], plan.blocks[block].rows,
                              &columns[column_begin[block]]);
    }

    // Every thread takes one run of neighbouring chunks: what it fetches ahead is its own.
    void multiply() {
        const auto scale = allocate<float>(Scratch::scale_size(w)), total = allocate<float>(Scratch::TOTAL_SIZE);
        const auto sums = allocate<float>(Scratch::SUMS_SIZE);
        const Scratch scratch{scale.get(), total.get(), sums.get()};
        if (columns) configure_tiles();
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t before = 0;
        for (const Block& block : plan.blocks) {
            const int64_t begin = column_begin[&block - plan.blocks.data()];
            const int8_t* own_columns = begin >= 0 ? &columns[begin] : nullptr;
            const float* own_slots[MAX_ROWS];
            float* target[MAX_ROWS];
            for (int64_t m = 0; m < block.rows; ++m) {
                own_slots[m] = &slots[slot_begin[block.first + m]];
                target[m] = row(block.first + m);
            }
            const auto is_mine = [&](int64_t chunk) {
                return (before + chunk * cost(block)) * team / work == thread;
            };
            int64_t chunk = 0, end = 0;
            while (chunk < chunks() && !is_mine(chunk)) ++chunk;
            for (end = chunk; end < chunks() && is_mine(end);) ++end;
            before += chunks() * cost(block);
            start_results(w, block.expert, block.rows, own_slots, chunk * CHUNK, last_row(end), target);
            for (; chunk < end; ++chunk) {
                const Task task{block.expert,
                                chunk * CHUNK,
                                last_row(chunk + 1),
                                block.rows,
                                &source[block.first],
                                own_columns,
                                target};
                with_planes(w.num_planes(block.expert), [&](auto planes) {
                    start<planes>(w, task, input(), scratch);
                    if (own_columns) multiply_tiles<planes>(w, task, scratch);
                    else multiply_vectors<planes>(w, task, input(), scratch);
                    finish(w, task, input(), scratch);
                });
            }
        }
        if (columns) release_tiles();
#pragma omp barrier
    }

    // The result at place `p`.
    float* row(int64_t p) const { return result.get() + p * w.out_features; }

private:
    int64_t chunks() const { return (w.out_features + CHUNK - 1) / CHUNK; }
    int64_t last_row(int64_t chunk) const { return std::min(chunk * CHUNK, w.out_features); }
    int64_t cost(const Block& block) const { return w.num_planes(block.expert) + block.rows; }
    Input input() const { return {limbs.get(), unit.get(), sums.get()}; }

    const Linear& w;
    const Plan& plan;
    const int64_t num_inputs;
    const std::vector<int64_t> source;
    std::vector<int64_t> slot_begin, column_begin;  // of places; of blocks, -1 for those that vectors multiply
    const Memory<int8_t> limbs;
    const Memory<float> unit, sums, result;
    Memory<float> slots;
    Memory<int8_t> columns;
    int64_t work = 0;
};
