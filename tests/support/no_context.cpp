// Before a backward pass, PyTorch asks whether a CUDA device has a context, to learn its stream. Where there is no such
// device, asking is an error; with this the answer is no.

#include <ATen/detail/CUDAHooksInterface.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

static bool no(const at::CUDAHooksInterface*, c10::DeviceIndex) { return false; }

extern "C" void answer_no() {
  const size_t functions = 256, before = 2;  // of the table, at most; what stands in front of it
  auto* hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  bool (at::CUDAHooksInterface::*asked)(c10::DeviceIndex) const = &at::CUDAHooksInterface::hasPrimaryContext;
  std::uintptr_t place;  // of a virtual function in the table, in bytes plus one (Itanium ABI)
  std::memcpy(&place, &asked, sizeof place);
  void**& table = *reinterpret_cast<void***>(hooks);
  void** copy = static_cast<void**>(std::malloc((functions + before) * sizeof(void*)));
  std::memcpy(copy, table - before, (functions + before) * sizeof(void*));
  table = copy + before;
  table[(place - 1) / sizeof(void*)] = reinterpret_cast<void*>(&no);
}
