#include "llama-razor-rewind.h"

#include "llama-razor-error.h"

#include "llama-impl.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

#include <fcntl.h>

#ifdef _WIN32
#include <io.h>
#include <process.h>
#include <sys/stat.h>
#else
#include <unistd.h>
#endif

//
// blocks in memory
//

class razor_rewind_ram : public llama_razor_rewind_store {
public:
    razor_rewind_ram(size_t n_block) : n_block(n_block) {}

    int64_t alloc() override {
        std::shared_ptr<uint8_t> data(new (std::nothrow) uint8_t[n_block], std::default_delete<uint8_t[]>());
        if (!data) {
            return -1;
        }

        size_t slot = 0;
        while (slot < blocks.size() && blocks[slot]) {
            ++slot;
        }
        if (slot == blocks.size()) {
            blocks.emplace_back();
        }

        blocks[slot] = std::move(data);

        return slot;
    }

    void free(int64_t slot) override { blocks[slot].reset(); }

    bool write(int64_t slot, size_t offset, size_t /* size */, const std::function<void(uint8_t * data)> & fill) override {
        fill(blocks[slot].get() + offset);

        return true;
    }

    std::shared_ptr<const uint8_t> read(int64_t slot) const override { return blocks[slot]; }

    uint64_t n_bytes() const override {
        uint64_t res = 0;
        for (const auto & data : blocks) {
            res += data ? n_block : 0;
        }

        return res;
    }

private:
    const size_t n_block;

    std::vector<std::shared_ptr<uint8_t>> blocks;
};

//
// blocks in a file
//

// a file without a name, which the system deletes when the process ends
//
// a process that was forked shares the file but not the slots, so only the process that created it may use it
class razor_rewind_file {
public:
    razor_rewind_file(const std::string & folder) {
#ifdef _WIN32
        const std::string path = folder + "\\razor-rewind-" + std::to_string(_getpid()) + "-" + std::to_string((uintptr_t) this);

        fd = _open(path.c_str(), _O_CREAT | _O_EXCL | _O_RDWR | _O_BINARY | _O_TEMPORARY | _O_NOINHERIT, _S_IREAD | _S_IWRITE);
#else
        std::string path = folder + "/razor-rewind-XXXXXX";

        fd = mkstemp(&path[0]);
        if (fd >= 0) {
            unlink(path.c_str());
            fcntl(fd, F_SETFD, FD_CLOEXEC);
        }

        pid = getpid();
#endif
        if (fd < 0) {
            llama_razor_error_throw(format("the rewind log cannot be created in %s (%s), name a folder that can be written to or keep the log in memory",
                        folder.c_str(), strerror(errno)));
        }
    }

    razor_rewind_file(const razor_rewind_file &) = delete;
    razor_rewind_file & operator=(const razor_rewind_file &) = delete;

    ~razor_rewind_file() {
#ifdef _WIN32
        _close(fd);
#else
        close(fd);
#endif
    }

    bool write(const uint8_t * data, size_t size, uint64_t offset) {
        return transfer(size, offset, [&](size_t done, size_t n) {
#ifdef _WIN32
            return _write(fd, data + done, n);
#else
            return pwrite(fd, data + done, n, offset + done);
#endif
        });
    }

    bool read(uint8_t * data, size_t size, uint64_t offset) const {
        return transfer(size, offset, [&](size_t done, size_t n) {
#ifdef _WIN32
            return _read(fd, data + done, n);
#else
            return pread(fd, data + done, n, offset + done);
#endif
        });
    }

    void truncate() {
        if (is_forked()) {
            return;
        }
#ifdef _WIN32
        const bool ok = _chsize_s(fd, 0) == 0;
#else
        const bool ok = ftruncate(fd, 0) == 0;
#endif
        if (!ok) {
            LLAMA_LOG_WARN("%s: the disk space of the rewind log is not free until the context ends (%s)\n", __func__, strerror(errno));
        }
    }

private:
    int fd;

#ifdef _WIN32
    bool is_forked() const { return false; }
#else
    pid_t pid;

    bool is_forked() const { return getpid() != pid; }
#endif

    template<typename F>
    bool transfer(size_t size, uint64_t offset, F && f) const {
        if (is_forked()) {
            errno = EPERM;

            return false;
        }
#ifdef _WIN32
        if (_lseeki64(fd, offset, SEEK_SET) < 0) {
            return false;
        }
#endif
        GGML_UNUSED(offset);

        for (size_t done = 0; done < size; ) {
            const auto n = f(done, std::min<size_t>(size - done, 1u << 30));

            if (n == 0) {
                errno = EIO; // the file is shorter than what was written to it
            }
            if (n == 0 || (n < 0 && errno != EINTR)) {
                return false;
            }

            done += std::max<decltype(n)>(n, 0);
        }

        return true;
    }
};

class razor_rewind_disk : public llama_razor_rewind_store {
public:
    razor_rewind_disk(const std::string & folder, size_t n_block, size_t n_part) : n_block(n_block), file(folder), buffer(n_part) {}

    int64_t alloc() override {
        size_t slot = 0;
        while (slot < slots.size() && slots[slot].used) {
            ++slot;
        }
        if (slot == slots.size()) {
            slots.emplace_back();
        }

        slots[slot] = { true, {} };

        return slot;
    }

    void free(int64_t slot) override {
        slots[slot].used = false;

        if (std::none_of(slots.begin(), slots.end(), [](const auto & s) { return s.used; })) {
            slots.clear();
            file.truncate();
        }
    }

    bool write(int64_t slot, size_t offset, size_t size, const std::function<void(uint8_t * data)> & fill) override {
        fill(buffer.data());

        slots[slot].parts.push_back({ size, checksum(buffer.data(), size) });

        return file.write(buffer.data(), size, slot*n_block + offset);
    }

    std::shared_ptr<const uint8_t> read(int64_t slot) const override {
        std::shared_ptr<uint8_t> res(new (std::nothrow) uint8_t[n_block], std::default_delete<uint8_t[]>());

        if (!res) {
            errno = ENOMEM;

            return nullptr;
        }

        if (!file.read(res.get(), n_block, slot*n_block)) {
            return nullptr;
        }

        const uint8_t * data = res.get();

        for (const auto & part : slots[slot].parts) {
            if (checksum(data, part.size) != part.sum) {
                errno = EIO; // the system failed to store a page after the write, or another process changed the file

                return nullptr;
            }

            data += part.size;
        }

        return res;
    }

    uint64_t n_bytes() const override { return slots.size()*n_block; }

private:
    struct part {
        size_t   size;
        uint64_t sum;
    };

    struct slot_info {
        bool used = false;

        std::vector<part> parts; // as they were written
    };

    const uint64_t n_block;

    razor_rewind_file file;

    std::vector<slot_info> slots;
    std::vector<uint8_t>   buffer; // for one part

    // FNV-1a of words, four of them at a time because each multiplication waits for the last one
    static uint64_t checksum(const uint8_t * data, size_t size) {
        constexpr uint64_t offset = 0xcbf29ce484222325ull;
        constexpr uint64_t prime  = 0x100000001b3ull;

        uint64_t lanes[4] = { offset, offset, offset, offset };

        size_t i = 0;
        for (; i + sizeof(lanes) <= size; i += sizeof(lanes)) {
            uint64_t words[4];
            memcpy(words, data + i, sizeof(words));
            for (int j = 0; j < 4; ++j) {
                lanes[j] = (lanes[j] ^ words[j])*prime;
            }
        }

        uint64_t res = offset;
        for (; i < size; ++i) {
            res = (res ^ data[i])*prime;
        }
        for (const uint64_t lane : lanes) {
            res = (res ^ lane)*prime;
        }

        return res;
    }
};

//
// llama_razor_rewind
//

llama_razor_rewind::llama_razor_rewind(const llama_razor_rewind_params & params, uint32_t n_stream, uint32_t n_step, std::vector<size_t> parts) :
    params(params), n_step(n_step), parts(std::move(parts)), streams(n_stream) {
    for (const size_t size : this->parts) {
        n_block += size;
    }

    if (params.mode == RAZOR_REWIND_FILE) {
        store = std::make_unique<razor_rewind_disk>(params.folder, n_block, *std::max_element(this->parts.begin(), this->parts.end()));
    } else {
        store = std::make_unique<razor_rewind_ram>(n_block);
    }
}

void llama_razor_rewind::add(uint32_t strm, uint32_t start) {
    if (!failure.empty()) {
        return;
    }

    auto & blocks = streams[strm];

    GGML_ASSERT((blocks.empty() || blocks.back().start + n_step == start) && "a fold was not logged or not cut");

    // 1. make room
    const uint64_t n_max = params.limit > 0 ? params.limit/n_block : std::numeric_limits<uint64_t>::max();

    while (n_used > 0 && n_used >= n_max) {
        drop_oldest();
    }
    if (n_max == 0) {
        return;
    }

    // 2. add the block
    const int64_t slot = store->alloc();
    if (slot < 0) {
        end("out of memory");

        return;
    }

    n_used++;

    block cur = { start, n_added++, std::shared_ptr<const int64_t>(new int64_t(slot), [this](const int64_t * slot) {
        store->free(*slot);
        n_used--;

        delete slot;
    }) };

    blocks.push_back(std::move(cur));
}

void llama_razor_rewind::write(uint32_t strm, uint32_t start, size_t part, const std::function<void(size_t part, uint8_t * data)> & fill) {
    if (!has(strm, start, start)) {
        return;
    }

    const auto & blocks = streams[strm];

    const int64_t slot   = *blocks[(start - blocks.front().start)/n_step].slot;
    const size_t  offset = std::accumulate(parts.begin(), parts.begin() + part, size_t(0));

    if (!store->write(slot, offset, parts[part], [&](uint8_t * data) { fill(part, data); })) {
        end(strerror(errno));
    }
}

void llama_razor_rewind::cut(uint32_t strm, uint32_t pos) {
    auto & blocks = streams[strm];

    while (!blocks.empty() && blocks.back().start > pos) {
        blocks.pop_back();
    }
}

void llama_razor_rewind::clear(uint32_t strm) {
    streams[strm].clear();
}

void llama_razor_rewind::copy(uint32_t src, uint32_t dst) {
    streams[dst] = streams[src];
}

bool llama_razor_rewind::has(uint32_t strm, uint32_t first, uint32_t last) const {
    const auto & blocks = streams[strm];

    return !blocks.empty() && blocks.front().start <= first && last <= blocks.back().start;
}

std::shared_ptr<const uint8_t> llama_razor_rewind::read(uint32_t strm, uint32_t start) {
    const auto & blocks = streams[strm];

    auto res = store->read(*blocks[(start - blocks.front().start)/n_step].slot);
    if (!res) {
        end(strerror(errno));
    }

    return res;
}

void llama_razor_rewind::drop_oldest() {
    std::deque<block> * oldest = nullptr;

    for (auto & blocks : streams) {
        if (!blocks.empty() && (!oldest || blocks.front().serial < oldest->front().serial)) {
            oldest = &blocks;
        }
    }

    oldest->pop_front();
}

void llama_razor_rewind::end(const char * why) {
    failure = why;

    LLAMA_LOG_WARN("razor: the rewind log has ended (%s), sequences can go back as far as without it\n", why);

    for (auto & blocks : streams) {
        blocks.clear();
    }
}
