// Memory of a call's own, which begins on a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastkit {

template <class U>
class Aligned {
 public:
  explicit Aligned(int64_t count) {  // not initialized
    constexpr size_t kLineBytes = 64;
    size_t size = static_cast<size_t>(count) * sizeof(U), bytes = size + kLineBytes;
    bytes_.reset(new char[bytes]);
    void* aligned = bytes_.get();
    data_ = static_cast<U*>(std::align(kLineBytes, size, aligned, bytes));
  }
  U* data() const { return data_; }

 private:
  std::unique_ptr<char[]> bytes_;
  U* data_;
};

}  // namespace fastkit
