#include "llama-razor-error.h"

#include "llama-razor.h"

#include <stdexcept>

static thread_local std::string razor_last_error;

void llama_razor_error_set(const std::string & msg) {
    razor_last_error = msg;

    // the message can contain text from a model file, and must not break the line or control a terminal
    for (char & c : razor_last_error) {
        if (c < ' ' || c > '~') {
            c = '?';
        }
    }
}

void llama_razor_error_throw(const std::string & msg) {
    llama_razor_error_set(msg);

    throw std::runtime_error("razor: " + msg);
}

const char * llama_razor_last_error(void) {
    return razor_last_error.c_str();
}
