// Does an answer hold turns of a chat? Nearly none does, and to see that takes the regular expressions of
// rewards_fast/conversation.py longer than scoring does.
#pragma once

#include "batch.h"

namespace catmllm::pvcp {

// False where neither a mark of a turn nor a tag of a tool stands in the text, as conversation.py knows them;
// true where one may.
bool may_hold_turns(const TextRef& text);

}  // namespace catmllm::pvcp
