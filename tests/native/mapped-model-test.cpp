// Loads a model from an open file: mapped-model-test FILE POSITION, where its GGUF begins. Exit status 1 if it is refused.

#include "check.h"
#include "llama.h"

int main(int, char ** arguments) {
    FILE * file = fopen(arguments[1], "rb");
    CHECK(file != nullptr && fseek(file, atol(arguments[2]), SEEK_SET) == 0);
    llama_model * model = llama_model_load_from_file_ptr(file, llama_model_default_params());
    CHECK(model != nullptr);
    llama_model_free(model);
    fclose(file);
    return 0;
}
