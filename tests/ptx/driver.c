/* A CUDA driver without a device, for looking at the code that would run on one: kernels are taken and written to a
 * folder, memory is the host's, launches are checked against the limits of the architecture and do nothing. What a
 * program reads back is therefore zero unless it wrote it itself.
 *
 *   cc -shared -fPIC -o libcuda.so.1 driver.c
 *   LD_LIBRARY_PATH=. CUDA_STUB_SM=80 CUDA_STUB_FOLDER=out voxgrad ...
 *
 * CUDA_STUB_SM: 80 or 90. CUDA_STUB_FOLDER: receives NAME.ptx of every kernel, and launches.txt: one line a launch, the
 * kernel's name, units a cube and bytes of dynamic shared memory.
 *
 * Only the functions that CubeCL 0.11.3 calls are here, with the signatures of the driver's reference manual. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_HANDLE = 400 };

static int architecture(void) {
    const char *sm = getenv("CUDA_STUB_SM");
    return sm ? atoi(sm) : 80;
}

/* Bytes of shared memory that a kernel may ask for: 163 KiB on 8.0, 227 KiB on 9.0. */
static int most_shared(void) { return (architecture() >= 90 ? 227 : 163) * 1024; }

static FILE *open_in_folder(const char *name, const char *suffix, const char *mode) {
    const char *folder = getenv("CUDA_STUB_FOLDER");
    char path[4096];
    snprintf(path, sizeof path, "%s/%s%s", folder ? folder : ".", name, suffix);
    return fopen(path, mode);
}

/* ---- devices and contexts ---- */

Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int *version) { return *version = 12080, SUCCESS; }
Result cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, SUCCESS; }
Result cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = (size_t)80 << 30, SUCCESS; }
Result cuDeviceGetPCIBusId(char *id, int length, int device) { return snprintf(id, length, "0000:00:00.0"), SUCCESS; }
Result cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "no device, sm_%d", architecture());
    return SUCCESS;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;                       /* units of a cube */
    case 2: case 3: *value = 1024; break;               /* along x, y */
    case 4: *value = 64; break;                         /* along z */
    case 5: *value = INT32_MAX; break;                  /* cubes along x */
    case 6: case 7: *value = 65535; break;              /* along y, z */
    case 8: *value = 48 * 1024; break;                  /* shared memory without asking */
    case 10: *value = 32; break;                        /* units of a warp */
    case 16: *value = architecture() >= 90 ? 132 : 108; break; /* multiprocessors */
    case 75: *value = architecture() / 10; break;
    case 76: *value = architecture() % 10; break;
    case 97: *value = most_shared(); break;
    default: *value = 0; break;
    }
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &most_shared, SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
Result cuCtxSetCurrent(void *context) { return SUCCESS; }
Result cuCtxGetCurrent(void **context) { return *context = &most_shared, SUCCESS; }
Result cuCtxSynchronize(void) { return SUCCESS; }
Result cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, SUCCESS; }

/* ---- memory: pages that nobody writes cost nothing ---- */

Result cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
    return *memory = (uint64_t)calloc(bytes, 1), *memory ? SUCCESS : 2;
}
Result cuMemFree_v2(uint64_t memory) { return free((void *)memory), SUCCESS; }
Result cuMemAllocAsync(uint64_t *memory, size_t bytes, void *stream) { return cuMemAlloc_v2(memory, bytes); }
Result cuMemFreeAsync(uint64_t memory, void *stream) { return cuMemFree_v2(memory); }
Result cuMemAllocHost_v2(void **memory, size_t bytes) { return cuMemAlloc_v2((uint64_t *)memory, bytes); }
Result cuMemFreeHost(void *memory) { return free(memory), SUCCESS; }
Result cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    return memcpy((void *)to, from, bytes), SUCCESS;
}
Result cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    return memcpy(to, (void *)from, bytes), SUCCESS;
}
Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    return memmove((void *)to, (void *)from, bytes), SUCCESS;
}
Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, void *stream) {
    return memset((void *)to, value, count), SUCCESS;
}

typedef struct {
    size_t from_x, from_y;
    unsigned from_type;
    const void *from_host;
    uint64_t from_device;
    void *from_array;
    size_t from_pitch;
    size_t to_x, to_y;
    unsigned to_type;
    void *to_host;
    uint64_t to_device;
    void *to_array;
    size_t to_pitch;
    size_t width, height;
} Copy2d;

Result cuMemcpy2DAsync_v2(const Copy2d *copy, void *stream) {
    enum { HOST = 1 };
    const char *from = copy->from_type == HOST ? copy->from_host : (const char *)copy->from_device;
    char *to = copy->to_type == HOST ? copy->to_host : (char *)copy->to_device;
    for (size_t y = 0; y < copy->height; y++)
        memcpy(to + (copy->to_y + y) * copy->to_pitch + copy->to_x,
               from + (copy->from_y + y) * copy->from_pitch + copy->from_x, copy->width);
    return SUCCESS;
}

/* ---- streams and events: everything is done at once ---- */

Result cuStreamCreate(void **stream, unsigned flags) { return *stream = malloc(1), SUCCESS; }
Result cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return cuStreamCreate(stream, flags); }
Result cuStreamDestroy_v2(void *stream) { return free(stream), SUCCESS; }
Result cuStreamSynchronize(void *stream) { return SUCCESS; }
Result cuStreamQuery(void *stream) { return SUCCESS; }
Result cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
Result cuEventCreate(void **event, unsigned flags) { return *event = malloc(1), SUCCESS; }
Result cuEventDestroy_v2(void *event) { return free(event), SUCCESS; }
Result cuEventRecord(void *event, void *stream) { return SUCCESS; }
Result cuEventQuery(void *event) { return SUCCESS; }
Result cuEventSynchronize(void *event) { return SUCCESS; }
Result cuEventElapsedTime(float *milliseconds, void *from, void *to) { return *milliseconds = 0, SUCCESS; }
Result cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) { return *milliseconds = 0, SUCCESS; }

/* ---- kernels ---- */

typedef struct {
    char *ptx;
    char name[512];
    int shared;
} Kernel;

Result cuModuleLoadData(Kernel **module, const void *image) {
    if (!strstr(image, ".entry")) return INVALID_IMAGE;
    *module = calloc(1, sizeof(Kernel));
    (*module)->ptx = strdup(image);
    return SUCCESS;
}
Result cuModuleUnload(Kernel *module) { return free(module->ptx), free(module), SUCCESS; }

Result cuModuleGetFunction(Kernel **function, Kernel *module, const char *name) {
    snprintf(module->name, sizeof module->name, "%s", name);
    FILE *file = open_in_folder(name, ".ptx", "w");
    if (!file) return INVALID_VALUE;
    fputs(module->ptx, file);
    fclose(file);
    return *function = module, SUCCESS;
}

Result cuFuncSetAttribute(Kernel *function, int attribute, int value) {
    enum { MOST_DYNAMIC_SHARED = 8 };
    if (attribute == MOST_DYNAMIC_SHARED) {
        if (value > most_shared()) return INVALID_VALUE;
        function->shared = value;
    }
    return SUCCESS;
}
Result cuFuncGetAttribute(int *value, int attribute, Kernel *function) { return *value = 0, SUCCESS; }

Result cuLaunchKernel(Kernel *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                      unsigned z, unsigned shared, void *stream, void **parameters, void **extra) {
    int asked = function->shared > 48 * 1024 ? function->shared : 48 * 1024;
    int fits = (uint64_t)x * y * z <= 1024 && z <= 64 && grid_x && grid_y && grid_z && grid_x <= INT32_MAX &&
               grid_y <= 65535 && grid_z <= 65535 && shared <= (unsigned)asked;
    FILE *file = open_in_folder("launches", ".txt", "a");
    if (!file) return INVALID_VALUE;
    fprintf(file, "%s %u %u%s\n", function->name, x * y * z, shared, fits ? "" : " REFUSED");
    fclose(file);
    return fits ? SUCCESS : INVALID_VALUE;
}
