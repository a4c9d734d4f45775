// keeps the error lines of llama.cpp's and ggml's log and optionally prints all of it
//
// the callback is not in Python: a Python signal handler could raise an exception in the middle of a computation

#include "llama-razor.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>

static const size_t RAZOR_LOG_LINES = 8;

static std::mutex razor_log_mutex;
static std::deque<std::string> razor_log_errors; // oldest first
static std::atomic<bool> razor_log_prints { false };

static void razor_on_log(enum ggml_log_level level, const char * text, void * /*user_data*/) {
    static thread_local enum ggml_log_level last = GGML_LOG_LEVEL_NONE;

    if (level != GGML_LOG_LEVEL_CONT) {
        last = level;
    }

    if (last == GGML_LOG_LEVEL_ERROR) {
        std::string line = text;
        const char * blank = " .\r\n";
        line.erase(0, line.find_first_not_of(blank));

        if (!line.empty()) {
            line.erase(std::min(line.find('\n'), line.find_last_not_of(" \r\n") + 1));
            std::lock_guard<std::mutex> lock(razor_log_mutex);
            razor_log_errors.push_back(line);
            if (razor_log_errors.size() > RAZOR_LOG_LINES) {
                razor_log_errors.pop_front();
            }
        }
    }

    if (razor_log_prints) {
        std::string shown = text; // can contain text from a model file, which must not control a terminal
        for (char & c : shown) {
            if ((unsigned char) c < ' ' && c != '\n' && c != '\t') {
                c = '?';
            }
        }
        fputs(shown.c_str(), stderr);
        fflush(stderr);
    }
}

void llama_razor_log_keep(bool print) {
    razor_log_prints = print;
    llama_log_set(razor_on_log, nullptr);
}

void llama_razor_log_clear(void) {
    std::lock_guard<std::mutex> lock(razor_log_mutex);
    razor_log_errors.clear();
}

int32_t llama_razor_log_get(char * lines, int32_t size) {
    std::lock_guard<std::mutex> lock(razor_log_mutex);
    std::string all;
    for (const std::string & line : razor_log_errors) {
        all += all.empty() ? line : "\n" + line;
    }
    if (size > 0) {
        const size_t n = std::min(all.size(), (size_t) size - 1);
        memcpy(lines, all.data(), n);
        lines[n] = '\0';
    }
    return (int32_t) all.size();
}
