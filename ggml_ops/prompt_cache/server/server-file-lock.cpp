#include "server-file-lock.h"

#include <stdexcept>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#endif

server_file_lock::server_file_lock([[maybe_unused]] const std::string & path) {
#ifndef _WIN32
    fd = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) {
        throw std::runtime_error(path + " cannot be created");
    }
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        close(fd);
        throw std::runtime_error(path + " is locked: another server uses it");
    }
#endif
}

server_file_lock::~server_file_lock() {
#ifndef _WIN32
    close(fd);
#endif
}
