// What PyTorch asks of a CUDA build besides kernels, answered without one: a device guard, the current stream, the
// accelerator's name. With it preloaded, a CPU-only PyTorch differentiates fake CUDA tensors.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <optional>

using namespace c10;

namespace {
constexpr DeviceIndex DEVICES = 2;
thread_local DeviceIndex current = 0;

void choose(Device device) {
  if (device.has_index()) current = device.index();
}

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device device) const override {
    Device before(DeviceType::CUDA, current);
    choose(device);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override { choose(device); }
  void uncheckedSetDevice(Device device) const noexcept override { choose(device); }
  Stream getStream(Device device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, device.has_index() ? device.index() : current));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
};
}  // namespace

extern "C" void install() { impl::registerDeviceGuard(DeviceType::CUDA, new Guard()); }

// These stand before PyTorch's own, because the library is preloaded.
#define SHOWN __attribute__((visibility("default")))
namespace at::accelerator {
SHOWN std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
SHOWN Stream getCurrentStream(DeviceIndex index) {
  return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index >= 0 ? index : 0));
}
SHOWN void setCurrentStream(Stream) {}
}  // namespace at::accelerator
namespace at::detail {
SHOWN const CUDAHooksInterface& getCUDAHooks() {
  static Hooks hooks;
  return hooks;
}
}  // namespace at::detail
