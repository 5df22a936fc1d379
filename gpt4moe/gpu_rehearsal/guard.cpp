// One CUDA device for a build of torch that has none, so that autograd runs on fake tensors of cuda:0.
//
// Without a device guard for CUDA, autograd aborts the whole process as soon as a fake cuda tensor requires a gradient.
// The guard below does nothing and says that device 0 is current. The hooks say that there is one device.
// Used with torch 2.13; guard.py builds and loads it.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
using c10::impl::NoOpDeviceGuardImpl;
struct OneCuda final : public NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Device zero() { return c10::Device(c10::DeviceType::CUDA, 0); }
  static c10::Stream one() { return c10::Stream(c10::Stream::DEFAULT, zero()); }
  c10::Device exchangeDevice(c10::Device) const override { return zero(); }
  c10::Device getDevice() const override { return zero(); }
  c10::Stream getStream(c10::Device) const noexcept override { return one(); }
  c10::Stream getDefaultStream(c10::Device) const override { return one(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return one(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return one(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};
static OneCuda g;
namespace at {
struct CUDAHooks final : public at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}

extern "C" void install_guard() { c10::impl::device_guard_impl_registry[(size_t)c10::DeviceType::CUDA].store(&g); }
