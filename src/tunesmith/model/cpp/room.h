// Memory of a call.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace {

// Memory for what lives during one call, kept from call to call: fresh pages cost more than the work in them.
class Room {
   public:
    explicit Room(std::initializer_list<int64_t> bytes) {
        static thread_local std::unique_ptr<char[]> held;
        static thread_local size_t size = 0;
        size_t total = 64;
        for (int64_t one : bytes) total += starts_.emplace_back(padded(one));
        if (size < total) held.reset(new char[size = total]);
        at_ = held.get() + (64 - reinterpret_cast<uintptr_t>(held.get()) % 64) % 64;
    }

    template <class T>
    T* take() {  // the next of those asked for
        char* here = at_;
        at_ += starts_[next_++];
        return reinterpret_cast<T*>(here);
    }

   private:
    static size_t padded(int64_t bytes) { return size_t(bytes + 127) / 64 * 64; }
    std::vector<size_t> starts_;
    size_t next_ = 0;
    char* at_;
};

}  // namespace
