#pragma once

// the rewind log of a context: what its folds drop, kept outside the cache so that a sequence can go back to any position
//
// each stream has a list of blocks, one per fold, that follow each other without a gap. A block holds the rows that a fold moves into
// the compensation token, and the compensation token and accumulators before the fold. What the bytes mean is up to the cache
//
// blocks have one size and never change: streams that are copied share them

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

enum llama_razor_rewind_mode {
    RAZOR_REWIND_OFF  = 0,
    RAZOR_REWIND_RAM  = 1,
    RAZOR_REWIND_FILE = 2,
};

struct llama_razor_rewind_params {
    llama_razor_rewind_mode mode = RAZOR_REWIND_OFF;

    uint64_t    limit = 0; // maximum bytes of all streams, 0: unlimited
    std::string folder;    // of the file, which is deleted when it is opened
};

// the bytes of blocks, in memory or in a file
class llama_razor_rewind_store {
public:
    virtual ~llama_razor_rewind_store() = default;

    // return the slot of a new block, -1 if out of memory
    virtual int64_t alloc()            = 0;
    virtual void    free(int64_t slot) = 0;

    // call fill(data) and store the bytes of a part of a block; return false if they cannot be written
    virtual bool write(int64_t slot, size_t offset, size_t size, const std::function<void(uint8_t * data)> & fill) = 0;

    // return the bytes of a block, nullptr if they cannot be read
    virtual std::shared_ptr<const uint8_t> read(int64_t slot) const = 0;

    // return the bytes of memory or disk in use
    virtual uint64_t n_bytes() const = 0;
};

class llama_razor_rewind {
public:
    // n_step: positions from a block to the next one
    // parts: the sizes of the parts in which a block is written
    // throws std::runtime_error if the file cannot be created
    llama_razor_rewind(const llama_razor_rewind_params & params, uint32_t n_stream, uint32_t n_step, std::vector<size_t> parts);

    // add the block of the fold before position start to a stream; its parts must be written afterwards, in ascending order
    // if the limit is reached, the oldest blocks of all streams are dropped. If the block cannot be allocated, the log ends
    void add(uint32_t strm, uint32_t start);

    // call fill(part, data) for a part of a block, if the stream has the block. If the part cannot be stored, the log ends
    void write(uint32_t strm, uint32_t start, size_t part, const std::function<void(size_t part, uint8_t * data)> & fill);

    // drop the blocks of folds after position pos
    void cut(uint32_t strm, uint32_t pos);

    void clear(uint32_t strm);

    // replace the blocks of dst by those of src
    void copy(uint32_t src, uint32_t dst);

    // return true if a stream has the blocks from first to last
    bool has(uint32_t strm, uint32_t first, uint32_t last) const;

    // return the bytes of a block that the stream has. If they cannot be read: return nullptr, the log ends
    std::shared_ptr<const uint8_t> read(uint32_t strm, uint32_t start);

    const llama_razor_rewind_params & get_params() const { return params; }

    uint64_t n_bytes() const { return store->n_bytes(); }

    // return why the log has ended because a block could not be written or read, "" if it has not
    const std::string & get_failure() const { return failure; }

private:
    struct block {
        uint32_t start;
        uint64_t serial; // of all blocks, in the order in which they were added

        std::shared_ptr<const int64_t> slot;
    };

    const llama_razor_rewind_params params;

    const uint32_t n_step;

    const std::vector<size_t> parts;

    size_t n_block = 0; // size of a block

    std::unique_ptr<llama_razor_rewind_store> store; // declared before streams: the destructors of their blocks free slots in it

    uint64_t n_added = 0;
    uint64_t n_used  = 0; // number of blocks; a block that sequences share counts once

    std::vector<std::deque<block>> streams;

    std::string failure;

    void drop_oldest();

    void end(const char * why);
};
