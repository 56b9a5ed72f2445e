// Threads that wait for work: starting one takes longer than scoring ten texts.
#pragma once

#include <cstddef>
#include <functional>

namespace catmllm::pvcp {

// Calls work() here and in up to `helpers` other threads at once; returns when all have returned. work() must
// not throw. Other threads join late or not at all: each call takes what is left to do. Callers do not wait
// for each other.
//
// The threads are started when first needed and wait without using the processor. A process after fork()
// begins with none. They hold nothing that has to be given back, so nobody joins them when the process ends.
void run_together(std::size_t helpers, const std::function<void()>& work);

}  // namespace catmllm::pvcp
