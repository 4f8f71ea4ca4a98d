#pragma once

#include <string>

// Keeps other processes from locking the same file, until it is destroyed. Does nothing on Windows.
class server_file_lock {
  public:
    // throws std::runtime_error if another process has locked the file
    explicit server_file_lock(const std::string & path);
    ~server_file_lock();

    server_file_lock(const server_file_lock &)             = delete;
    server_file_lock & operator=(const server_file_lock &) = delete;

  private:
    int fd = -1;
};
