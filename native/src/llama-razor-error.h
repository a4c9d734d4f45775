#pragma once

// Why razor refused what this thread asked for last: one printable line per thread, which llama_razor_last_error() returns.
// It includes nothing of razor, so that everything can include it.

#include <string>

// "": nothing was refused
void llama_razor_error_set(const std::string & msg);

// the same, then throws std::runtime_error
[[noreturn]] void llama_razor_error_throw(const std::string & msg);
