#include "server-checkpoint.h"

#include <algorithm>
#include <map>
#include <set>

static const int32_t N_LAST         = 4;     // tokens after the last cut; evaluated again if an answer is regenerated
static const double  WORTH_MESSAGE  = 4.0;   // see server_checkpoints_fit()
static const double  WORTH_DISTANCE = 1024;  // tokens that are added to the distance from the end

server_prompt_cuts::server_prompt_cuts(const common_chat_msg_spans & spans, int32_t n_tokens, int32_t n_ubatch) :
    n_tokens(n_tokens), n_ubatch(std::max(1, n_ubatch)) {
    std::vector<int32_t> starts;
    for (const auto & span : spans.spans) {
        if (span.role == COMMON_CHAT_ROLE_USER && span.pos > 0 && (int64_t) span.pos < n_tokens) {
            starts.push_back((int32_t) span.pos);
        }
    }
    // short messages in a row would make small batches, so only the first and the last message always get a cut
    int32_t last = 0;
    for (const int32_t start : starts) {
        if (start == starts.front() || start == starts.back() || start - last >= this->n_ubatch / 2) {
            messages.push_back(start);
            last = start;
        }
    }
    const int32_t end = n_tokens - N_LAST;
    if (end > last) {
        messages.push_back(end);
    }
}

int32_t server_prompt_cuts::next(int32_t pos) const {
    const auto    after = std::upper_bound(messages.begin(), messages.end(), pos);
    const int32_t start = after == messages.begin() ? 0 : *std::prev(after);
    const int32_t stop  = after == messages.end() ? n_tokens : *after;
    return (int32_t) std::min<int64_t>(stop, start + ((int64_t) (pos - start) / n_ubatch + 1) * n_ubatch);
}

bool server_prompt_cuts::is_message(int32_t pos) const {
    return std::binary_search(messages.begin(), messages.end(), pos);
}

bool server_prompt_cuts::is_cut(int32_t pos) const {
    return pos > 0 && next(pos - 1) == pos;
}

int32_t server_prompt_cuts::batch_end(int32_t pos, int32_t n_batch, int64_t last, int32_t step) const {
    int32_t end = next(pos);
    while (end < n_tokens && end - pos <= n_batch - n_ubatch && (end - pos) % n_ubatch == 0 && !is_message(end) &&
           end - last < step) {
        end = next(end);
    }
    return std::min(end, pos + n_batch);
}

size_t server_checkpoints_size(const std::vector<server_checkpoints_owner> & owners) {
    std::set<const server_checkpoint *> seen;
    size_t                              size = 0;
    for (const auto & owner : owners) {
        for (const auto & checkpoint : *owner.checkpoints) {
            if (seen.insert(checkpoint.get()).second) {
                size += checkpoint->size();
            }
        }
    }
    return size;
}

size_t server_checkpoints_fit(const std::vector<server_checkpoints_owner> & owners, size_t limit) {
    size_t size      = server_checkpoints_size(owners);
    size_t n_removed = 0;
    while (size > limit) {
        std::map<const server_checkpoint *, double> worth;
        for (const auto & owner : owners) {
            int64_t before = 0;
            for (auto it = owner.checkpoints->begin(); it != owner.checkpoints->end(); ++it) {
                const auto &  checkpoint = **it;
                const auto    next       = std::next(it);
                const int64_t after      = next == owner.checkpoints->end() ? owner.n_tokens : (*next)->n_tokens;
                const double  weight     = checkpoint.at_message ? WORTH_MESSAGE : 1.0;
                const double far = (double) std::max<int64_t>(0, owner.n_tokens - checkpoint.n_tokens) + WORTH_DISTANCE;
                const double here = weight * (double) (after - before) / far / (double) (1 + owner.age);
                double &     most = worth[&checkpoint];
                most              = std::max(most, here);
                before            = checkpoint.n_tokens;
            }
        }
        if (worth.empty()) {
            break;
        }
        const auto * least = std::min_element(worth.begin(), worth.end(), [](const auto & a, const auto & b) {
                                 return a.second < b.second;
                             })->first;
        size -= least->size();
        n_removed++;
        for (const auto & owner : owners) {
            owner.checkpoints->remove_if([&](const auto & checkpoint) { return checkpoint.get() == least; });
        }
    }
    return n_removed;
}

void server_checkpoints_merge(server_checkpoints & to, const server_checkpoints & from, int64_t n_tokens) {
    auto it = to.begin();
    for (const auto & checkpoint : from) {
        while (it != to.end() && (*it)->n_tokens < checkpoint->n_tokens) {
            ++it;
        }
        if (checkpoint->n_tokens <= n_tokens && (it == to.end() || (*it)->n_tokens != checkpoint->n_tokens)) {
            to.insert(it, checkpoint);
        }
    }
}
