#pragma once

// the reason for razor's last refusal, one printable line per thread, returned by llama_razor_last_error()
//
// this header is below all others of razor and includes none of them

#include <string>

// "" if nothing was refused
void llama_razor_error_set(const std::string & msg);

// set the text, then throw std::runtime_error
[[noreturn]] void llama_razor_error_throw(const std::string & msg);
