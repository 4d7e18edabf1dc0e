extern "C" __global__ void saxpy(int n, float a, const float* x, float* y) {
  int i = blockIdx.x*blockDim.x+threadIdx.x; if (i < n) y[i] = a*x[i]+expf(y[i]);
}
extern "C" __global__ void reduce(int n, const float* x, float* out) {
  __shared__ float s[256]; float t = 0;
  for (int i = blockIdx.x*256+threadIdx.x; i < n; i += gridDim.x*256) t += sinf(x[i]*1e3f);
  s[threadIdx.x]=t; __syncthreads();
  for (int k=128;k>=32;k>>=1){ if (threadIdx.x<k) s[threadIdx.x]+=s[threadIdx.x+k]; __syncthreads(); }
  if (threadIdx.x<32){ t=s[threadIdx.x]; for(int k=16;k;k>>=1) t+=__shfl_xor_sync(~0u,t,k); if(!threadIdx.x) atomicAdd(out,t);}
}
