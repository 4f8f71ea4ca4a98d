#include "server-slot-file.h"

#include "../server-common.h"
#include "server-hash.h"
#include "speculative.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <vector>

#ifndef _WIN32
#include <fcntl.h>
#include <unistd.h>
#endif

namespace {

constexpr uint32_t TAG_IDENTITY   = 0x6e656469;          // "iden"
constexpr uint32_t TAG_DRAFT      = 0x74667264;          // "drft"
constexpr uint32_t TAG_HIDDEN     = 0x63657073;          // "spec"
constexpr uint32_t TAG_CHECKPOINT = 0x74706b63;          // "ckpt"
constexpr uint64_t MAGIC_END      = 0x31746f6c73696d6b;  // "kmislot1"

constexpr const char * DRAFT_MODEL = "draft model";  // in an identity; it may differ
constexpr const char * ADAPTERS    = "LoRA adapters";
constexpr const char * NONE        = "none";

struct section_head {
    uint32_t tag;
    uint32_t zero;
    uint64_t size;
};

struct checkpoint_head {
    int64_t  n_tokens;
    int32_t  pos_min;
    int32_t  pos_max;
    uint32_t at_message;
    uint32_t zero;
    uint64_t size_tgt;
    uint64_t size_dft;
};

struct file_end {
    uint64_t size;  // of upstream's part
    uint64_t hash_low;
    uint64_t hash_high;
    uint64_t magic;
};

using bytes = std::vector<uint8_t>;

// reads a file or a part of it, never beyond its end
class reader {
  public:
    reader(std::ifstream & file, uint64_t end) : file(file), end(end) {}

    uint64_t left() { return end - (uint64_t) file.tellg(); }

    template <typename T> T read() {
        T value;
        read(&value, sizeof(value));
        return value;
    }

    bytes read_bytes(uint64_t size) {
        expect(size);
        bytes data(size);
        read(data.data(), size);
        return data;
    }

    void read(void * data, uint64_t size) {
        expect(size);
        if (size > 0 && !file.read((char *) data, size)) {
            throw std::runtime_error("the file cannot be read");
        }
    }

  private:
    void expect(uint64_t size) {
        if (size > left()) {
            throw std::runtime_error("the file is damaged: it ends in the middle of its content");
        }
    }

    std::ifstream & file;
    uint64_t        end;
};

// what the sections of a file contain
struct sections {
    bool                           present = false;
    server_slot_identity           identity;
    bytes                          draft;
    bytes                          hidden;  // of common_speculative_get_state()
    std::vector<server_checkpoint> checkpoints;
};

bytes state_of(llama_context * ctx, llama_seq_id id, llama_state_seq_flags flags) {
    bytes data(llama_state_seq_get_size_ext(ctx, id, flags));
    if (data.empty() || llama_state_seq_get_data_ext(ctx, data.data(), data.size(), id, flags) != data.size()) {
        throw std::runtime_error("the slot's state was lost when a batch failed");
    }
    return data;
}

bool set_state(llama_context * ctx, llama_seq_id id, const bytes & data, llama_state_seq_flags flags) {
    return llama_state_seq_set_data_ext(ctx, data.data(), data.size(), id, flags) == data.size();
}

void write_sections(std::ofstream &              file,
                    const server_prompt &        prompt,
                    const bytes &                draft,
                    const bytes &                hidden,
                    const server_slot_identity & identity) {
    const auto write         = [&](const void * data, size_t size) { file.write((const char *) data, size); };
    const auto write_section = [&](uint32_t tag, const void * data, size_t size) {
        const section_head head{ tag, 0, size };
        write(&head, sizeof(head));
        write(data, size);
    };

    std::string text = server_identity_text(identity);
    text += std::string(ADAPTERS) + '\n' + (prompt.adapters.empty() ? NONE : prompt.adapters) + '\n';
    write_section(TAG_IDENTITY, text.data(), text.size());

    if (!draft.empty()) {
        write_section(TAG_DRAFT, draft.data(), draft.size());
    }
    if (!hidden.empty()) {
        write_section(TAG_HIDDEN, hidden.data(), hidden.size());
    }

    for (const auto & checkpoint : prompt.checkpoints) {
        const checkpoint_head fields{
            checkpoint->n_tokens,        checkpoint->pos_min,        checkpoint->pos_max, checkpoint->at_message, 0,
            checkpoint->data_tgt.size(), checkpoint->data_dft.size()
        };
        const section_head head{ TAG_CHECKPOINT, 0, sizeof(fields) + fields.size_tgt + fields.size_dft };
        write(&head, sizeof(head));
        write(&fields, sizeof(fields));
        write(checkpoint->data_tgt.data(), fields.size_tgt);
        write(checkpoint->data_dft.data(), fields.size_dft);
        if (!checkpoint->data_spec.empty()) {
            write_section(TAG_HIDDEN, checkpoint->data_spec.data(), checkpoint->data_spec.size());
        }
    }
}

sections read_sections(std::ifstream & file, uint64_t begin, uint64_t end) {
    sections saved;
    saved.present = true;
    file.seekg(begin);
    reader in(file, end);
    while (in.left() > 0) {
        const auto head = in.read<section_head>();
        if (head.size > in.left()) {
            throw std::runtime_error("the file is damaged: a section is longer than the file");
        }
        if (head.tag == TAG_IDENTITY) {
            const bytes        text = in.read_bytes(head.size);
            std::istringstream lines(std::string(text.begin(), text.end()));
            for (std::string name, value; std::getline(lines, name) && std::getline(lines, value);) {
                saved.identity[name] = value;
            }
        } else if (head.tag == TAG_DRAFT) {
            saved.draft = in.read_bytes(head.size);
        } else if (head.tag == TAG_HIDDEN) {
            (saved.checkpoints.empty() ? saved.hidden : saved.checkpoints.back().data_spec) = in.read_bytes(head.size);
        } else if (head.tag == TAG_CHECKPOINT) {
            const auto fields = in.read<checkpoint_head>();
            if (head.size < sizeof(fields) || fields.size_tgt > head.size - sizeof(fields) ||
                fields.size_dft != head.size - sizeof(fields) - fields.size_tgt) {
                throw std::runtime_error("the file is damaged: a checkpoint has another size than its section");
            }
            server_checkpoint checkpoint;
            checkpoint.update_pos(fields.n_tokens, fields.pos_min, fields.pos_max);
            checkpoint.at_message = fields.at_message != 0;
            checkpoint.data_tgt   = in.read_bytes(fields.size_tgt);
            checkpoint.data_dft   = in.read_bytes(fields.size_dft);
            saved.checkpoints.push_back(std::move(checkpoint));
        } else {
            throw std::runtime_error("the file has a section of an unknown kind: it is from a later version");
        }
    }
    return saved;
}

// the last bytes of a file that this code wrote; magic = 0: upstream's
file_end read_end(std::ifstream & file, uint64_t size) {
    file_end end{};
    if (size >= sizeof(end)) {
        file.seekg(size - sizeof(end));
        file.read((char *) &end, sizeof(end));
    }
    if (!file || end.magic != MAGIC_END || end.size > size - sizeof(end)) {
        file.clear();
        return {};
    }
    file.seekg(0);
    server_hasher hash;
    if (!hash.add(file, size - sizeof(end) + sizeof(end.size))) {
        throw std::runtime_error("the file cannot be read");
    }
    const XXH128_hash_t actual   = hash.digest();
    const XXH128_hash_t expected = { end.hash_low, end.hash_high };
    if (server_hex(actual) != server_hex(expected)) {
        throw std::runtime_error("the file is damaged: its checksum is " + server_hex(actual) + ", expected " +
                                 server_hex(expected));
    }
    return end;
}

void check_identity(const server_slot_identity & saved, const server_slot_identity & expected) {
    for (const auto & [name, value] : expected) {
        const auto it = saved.find(name);
        if (name != DRAFT_MODEL && (it == saved.end() || it->second != value)) {
            throw std::runtime_error("the file was saved with another " + name + ": expected " + value + ", found " +
                                     (it == saved.end() ? NONE : it->second));
        }
    }
}

// Returns the LoRA adapters with which a prompt was evaluated.
std::string read_adapters(const server_slot_identity & saved, const std::vector<std::string> & loaded) {
    const auto it = saved.find(ADAPTERS);
    if (it == saved.end() || it->second == NONE) {
        return "";
    }
    std::istringstream words(it->second);
    for (std::string word; words >> word;) {  // ID*SCALE
        const std::string id     = word.substr(0, word.rfind('*'));
        const bool        listed = id.size() < word.size();
        if (listed && std::find(loaded.begin(), loaded.end(), id) == loaded.end()) {
            throw std::runtime_error("the file was saved with the LoRA adapter " + id + ", which is not loaded");
        }
    }
    return it->second;
}

bool has_state_beside_attention(const llama_context * ctx) {
    const llama_model * model = llama_get_model(ctx);
    return llama_model_is_hybrid(model) || llama_model_is_recurrent(model) || llama_model_n_swa(model) > 0;
}

server_tokens read_tokens(
    std::ifstream & file, uint64_t end, bool has_mtmd, int32_t n_ctx, const llama_context * ctx, uint32_t & n_packed) {
    file.seekg(0);
    reader     in(file, end);
    const auto magic   = in.read<uint32_t>();
    const auto version = in.read<uint32_t>();
    if (magic != LLAMA_STATE_SEQ_MAGIC || version != LLAMA_STATE_SEQ_VERSION) {
        throw std::runtime_error(string_format("not a saved slot: magic and version are %08x %u, expected %08x %u",
                                               magic, version, LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION));
    }
    n_packed = in.read<uint32_t>();
    if (n_packed > in.left() / sizeof(llama_token)) {
        throw std::runtime_error("the file is damaged: it has more tokens than bytes");
    }
    llama_tokens packed(n_packed);
    in.read(packed.data(), packed.size() * sizeof(llama_token));

    server_tokens tokens = server_tokens::deserialize(packed, has_mtmd);
    if (tokens.size() > (size_t) n_ctx) {
        throw std::runtime_error(
            string_format("the file's %zu tokens do not fit in the slot's context of %d", tokens.size(), n_ctx));
    }
    if (!tokens.validate(ctx)) {
        throw std::runtime_error("the file has tokens that the model does not have");
    }
    return tokens;
}

// the positions that a sequence must have after n tokens of a prompt
void expect_position(llama_context * ctx, llama_seq_id id, llama_pos expected, const char * what) {
    const llama_pos last = llama_memory_seq_pos_max(llama_get_memory(ctx), id);
    if (last != expected) {
        throw std::runtime_error(string_format("%s ends at position %d, expected %d", what, last, expected));
    }
}

// restore all states into the contexts; each checkpoint is loaded once, so that none can fail later
server_checkpoints restore(const std::string &   path,
                           uint64_t              size_tgt,
                           uint32_t              n_packed,
                           const server_tokens & tokens,
                           sections &            saved,
                           llama_context *       ctx_tgt,
                           llama_context *       ctx_dft,
                           llama_seq_id          id) {
    llama_tokens packed(std::max(1u, n_packed));  // not null
    size_t       n_found = 0;
    const size_t n_read  = llama_state_seq_load_file(ctx_tgt, path.c_str(), id, packed.data(), packed.size(), &n_found);
    if (n_read == 0) {
        throw std::runtime_error(
            "the state does not fit this model, its cache or the free space in it; the log has details");
    }
    if (n_read != size_tgt) {
        throw std::runtime_error(
            string_format("the file is truncated or damaged: its state ends after %zu bytes, expected %zu", n_read,
                          (size_t) size_tgt));
    }
    const llama_pos pos_last = tokens.pos_next() - 1;
    expect_position(ctx_tgt, id, pos_last, "the state");

    if (ctx_dft) {
        llama_memory_seq_rm(llama_get_memory(ctx_dft), id, -1, -1);
        if (!saved.draft.empty()) {
            if (!set_state(ctx_dft, id, saved.draft, LLAMA_STATE_SEQ_FLAGS_NONE)) {
                throw std::runtime_error("the draft model's state does not fit this draft model or its cache");
            }
            if (llama_memory_seq_pos_max(llama_get_memory(ctx_dft), id) > pos_last) {
                throw std::runtime_error("the draft model's state has more positions than the prompt");
            }
        }
    }

    const bool         needs_tgt = has_state_beside_attention(ctx_tgt);
    const bool         needs_dft = ctx_dft != nullptr;
    server_checkpoints checkpoints;
    if (saved.checkpoints.empty() || !(needs_tgt || needs_dft)) {
        return checkpoints;
    }
    const auto  flags   = LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;
    const bytes end_tgt = state_of(ctx_tgt, id, flags);
    const bytes end_dft = ctx_dft ? state_of(ctx_dft, id, flags) : bytes();
    int64_t     n_last  = 0;
    for (auto & checkpoint : saved.checkpoints) {
        if (checkpoint.n_tokens <= n_last || (size_t) checkpoint.n_tokens >= tokens.size() || checkpoint.pos_min < 0 ||
            checkpoint.pos_min > checkpoint.pos_max || checkpoint.pos_max != tokens.pos_next(checkpoint.n_tokens) - 1) {
            throw std::runtime_error("the file is damaged: a checkpoint is not inside the prompt");
        }
        n_last             = checkpoint.n_tokens;
        const bool has_tgt = !checkpoint.data_tgt.empty();  // attention needs no state to remove tokens
        if (!needs_dft) {
            checkpoint.data_dft.clear();
        }
        if (has_tgt != needs_tgt || checkpoint.data_dft.empty() == needs_dft ||
            (has_tgt && !set_state(ctx_tgt, id, checkpoint.data_tgt, flags)) ||
            (needs_dft && !set_state(ctx_dft, id, checkpoint.data_dft, flags))) {
            throw std::runtime_error("a checkpoint does not fit this model or its cache");
        }
        if (has_tgt) {
            expect_position(ctx_tgt, id, checkpoint.pos_max, "a checkpoint");
        }
        checkpoints.push_back(std::make_shared<server_checkpoint>(std::move(checkpoint)));
    }
    if (!set_state(ctx_tgt, id, end_tgt, flags) || (ctx_dft && !set_state(ctx_dft, id, end_dft, flags))) {
        throw std::runtime_error("the state cannot be restored");
    }
    return checkpoints;
}

// wait until the bytes of the file are on the disk
void flush_to_disk(const std::string & path) {
#ifndef _WIN32
    const int fd = open(path.c_str(), O_RDONLY);
    if (fd < 0 || fsync(fd) != 0) {
        if (fd >= 0) {
            close(fd);
        }
        throw std::runtime_error("the file cannot be written to the disk");
    }
    close(fd);
#else
    (void) path;
#endif
}

// Write a file; write_state writes upstream's part and returns its size.
template <typename F>
size_t save(const std::string &          path,
            const server_prompt &        prompt,
            const bytes &                draft,
            const bytes &                hidden,
            const server_slot_identity & identity,
            F &&                         write_state) {
    const std::string part = path + ".part";
    try {
        const std::vector<char> packed = prompt.tokens.serialize();
        GGML_ASSERT(packed.size() % sizeof(llama_token) == 0);

        file_end end{ write_state(part, packed), 0, 0, MAGIC_END };
        if (end.size == 0) {
            throw std::runtime_error("the state cannot be written; the log has details");
        }
        {
            std::ofstream file(part, std::ios::binary | std::ios::app);
            write_sections(file, prompt, draft, hidden, identity);
            file.write((const char *) &end.size, sizeof(end.size));
            file.close();
            if (!file) {
                throw std::runtime_error("the file cannot be written");
            }
        }
        const uint64_t size = std::filesystem::file_size(part);
        {
            std::ifstream file(part, std::ios::binary);
            server_hasher hash;
            if (!hash.add(file, size)) {
                throw std::runtime_error("the file cannot be read back");
            }
            end.hash_low  = hash.digest().low64;
            end.hash_high = hash.digest().high64;
        }
        {
            std::ofstream file(part, std::ios::binary | std::ios::app);
            file.write((const char *) &end.hash_low, sizeof(end) - sizeof(end.size));
            file.close();
            if (!file) {
                throw std::runtime_error("the file cannot be written");
            }
        }
        flush_to_disk(part);
        std::filesystem::rename(part, path);
        return size + sizeof(end) - sizeof(end.size);
    } catch (...) {
        std::error_code ignored;
        if (std::filesystem::is_regular_file(part, ignored)) {
            std::filesystem::remove(part, ignored);
        }
        throw;
    }
}

}  // namespace

size_t server_slot_save(const std::string &          path,
                        const server_prompt &        prompt,
                        llama_context *              ctx_tgt,
                        llama_context *              ctx_dft,
                        common_speculative *         spec,
                        llama_seq_id                 id,
                        const server_slot_identity & identity) {
    const bytes draft = ctx_dft ? state_of(ctx_dft, id, LLAMA_STATE_SEQ_FLAGS_NONE) : bytes();
    bytes       hidden;
    common_speculative_get_state(spec, id, hidden);
    return save(path, prompt, draft, hidden, identity, [&](const std::string & part, const std::vector<char> & packed) {
        return llama_state_seq_save_file(ctx_tgt, part.c_str(), id,
                                         reinterpret_cast<const llama_token *>(packed.data()),
                                         packed.size() / sizeof(llama_token));
    });
}

size_t server_slot_save(const std::string &               path,
                        const server_prompt_cache_state & state,
                        const server_slot_identity &      identity) {
    constexpr size_t N_HEAD =
        sizeof(uint32_t) + sizeof(llama_seq_id);  // a magic number and the sequence, in memory only
    return save(path, state.prompt, state.data.drft, state.data.spec, identity,
                [&](const std::string & part, const std::vector<char> & packed) {
                    const uint32_t head[] = { LLAMA_STATE_SEQ_MAGIC, LLAMA_STATE_SEQ_VERSION,
                                              (uint32_t) (packed.size() / sizeof(llama_token)) };
                    std::ofstream  file(part, std::ios::binary);
                    file.write((const char *) head, sizeof(head));
                    file.write(packed.data(), packed.size());
                    file.write((const char *) state.data.main.data() + N_HEAD, state.data.main.size() - N_HEAD);
                    file.close();
                    return file ? sizeof(head) + packed.size() + state.data.main.size() - N_HEAD : 0;
                });
}

server_prompt server_slot_restore(const std::string & path, const server_slot_target & target, size_t & n_bytes) {
    llama_context * const ctx_tgt = target.ctx_tgt;
    llama_context * const ctx_dft = target.ctx_dft;
    const auto            id      = target.id;

    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) {
        throw std::runtime_error("the file does not exist or cannot be read");
    }
    n_bytes                 = file.tellg();
    const auto end          = read_end(file, n_bytes);
    const bool has_sections = end.magic == MAGIC_END;
    const auto n_state      = has_sections ? end.size : n_bytes;

    sections      saved;
    server_prompt prompt;
    prompt.adapters = target.adapters;
    if (has_sections) {
        saved = read_sections(file, end.size, n_bytes - sizeof(end));
        check_identity(saved.identity, target.identity);
        prompt.adapters = read_adapters(saved.identity, target.adapter_ids);
        if (ctx_dft && saved.identity[DRAFT_MODEL] != target.identity.at(DRAFT_MODEL)) {
            saved.draft.clear();
            saved.hidden.clear();
            saved.checkpoints.clear();  // a checkpoint needs the states of both models
        }
    }

    uint32_t n_packed = 0;
    prompt.tokens     = read_tokens(file, n_state, target.has_mtmd, target.n_ctx, ctx_tgt, n_packed);
    file.close();

    // a file of upstream has no checksum: keep the slot's present state, to restore it if the file is damaged
    std::vector<std::pair<llama_context *, bytes>> before;
    for (llama_context * ctx : { ctx_tgt, ctx_dft }) {
        if (ctx) {
            before.emplace_back(ctx, llama_memory_seq_pos_max(llama_get_memory(ctx), id) < 0
                                         ? bytes()
                                         : state_of(ctx, id, LLAMA_STATE_SEQ_FLAGS_NONE));
        }
    }
    try {
        prompt.checkpoints = restore(path, n_state, n_packed, prompt.tokens, saved, ctx_tgt, ctx_dft, id);
    } catch (...) {
        for (const auto & [ctx, data] : before) {
            llama_memory_seq_rm(llama_get_memory(ctx), id, -1, -1);
            if (!data.empty() && !set_state(ctx, id, data, LLAMA_STATE_SEQ_FLAGS_NONE)) {
                for (const auto & [other, unused] : before) {
                    llama_memory_seq_rm(llama_get_memory(other), id, -1, -1);
                }
                throw std::runtime_error("the slot cannot be restored and is empty now");
            }
        }
        throw;
    }
    common_speculative_set_state(target.spec, id, saved.hidden);
    return prompt;
}
