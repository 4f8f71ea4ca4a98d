#include "server-slot-identity.h"

#include "server-hash.h"

#include <regex>
#include <stdexcept>
#include <vector>

std::string server_file_identity(const std::string & path) {
    constexpr uint64_t HEAD = 1 << 20, SAMPLE = 4096, N_SAMPLES = 64;

    std::vector<std::string> files;
    std::smatch              match;
    if (std::regex_match(path, match, std::regex("(.*)-\\d{5}-of-(\\d{5})\\.gguf"))) {
        const int count = std::stoi(match[2]);
        for (int i = 1; i <= count; i++) {
            files.push_back(string_format("%s-%05d-of-%05d.gguf", match[1].str().c_str(), i, count));
        }
    } else {
        files.push_back(path);
    }

    server_hasher hash;
    for (const auto & name : files) {
        std::ifstream file(name, std::ios::binary | std::ios::ate);
        if (!file) {
            throw std::runtime_error("the model cannot be read: " + name);
        }
        const uint64_t size = file.tellg();
        hash.add(&size, sizeof(size));
        const bool is_large = size > HEAD + SAMPLE;
        file.seekg(0);
        bool ok = hash.add(file, is_large ? HEAD : size);
        for (uint64_t i = 0; ok && is_large && i < N_SAMPLES; i++) {  // the last one ends with the file
            file.seekg(HEAD + (size - HEAD - SAMPLE) * i / (N_SAMPLES - 1));
            ok = hash.add(file, SAMPLE);
        }
        if (!ok) {
            throw std::runtime_error("the model cannot be read: " + name);
        }
    }
    return server_hex(hash.digest());
}

std::string server_identity_text(const server_slot_identity & identity) {
    std::string text;
    for (const auto & [name, value] : identity) {
        text += name + '\n' + value + '\n';
    }
    return text;
}

std::string server_identity_hash(const server_slot_identity & identity) {
    const std::string text = server_identity_text(identity);
    server_hasher     hash;
    hash.add(text.data(), text.size());
    return server_hex(hash.digest());
}
