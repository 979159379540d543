// Uninitialized, 64-byte aligned scratch memory that a kernel reuses from tile to tile.
#pragma once

#include <cstdint>
#include <new>

namespace vicinal {

// Growing discards the contents and allocates 1.5 times the requested size.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    const int64_t new_capacity = count + count / 2;
    void* new_data = ::operator new(new_capacity * sizeof(T), std::align_val_t(64));
    ::operator delete(data_, std::align_val_t(64));
    data_ = static_cast<T*>(new_data);
    capacity_ = new_capacity;
  }
  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t index) { return data_[index]; }
  const T& operator[](int64_t index) const { return data_[index]; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace vicinal
