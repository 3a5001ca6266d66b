// A server and its client, a thread, ciphers and streams of files.
const { createCipheriv, createDecipheriv, createHash, randomBytes } = require('crypto')
const fs = require('fs')
const http = require('http')
const { pipeline } = require('stream/promises')
const { Worker } = require('worker_threads')
const zlib = require('zlib')

const sum = (b) => createHash('sha256').update(b).digest('hex')

async function main () {
  process.chdir(fs.mkdtempSync('/tmp/work-'))
  const data = randomBytes(8 << 20)
  fs.writeFileSync('data', data)
  const key = randomBytes(32)
  const iv = randomBytes(16)
  await pipeline(fs.createReadStream('data'), zlib.createGzip({ level: 1 }), createCipheriv('aes-256-ctr', key, iv), fs.createWriteStream('packed'))
  await pipeline(fs.createReadStream('packed'), createDecipheriv('aes-256-ctr', key, iv), zlib.createGunzip(), fs.createWriteStream('again'))
  console.log('files', sum(fs.readFileSync('again')) === sum(data))

  const server = http.createServer(async (req, res) => {
    const parts = []
    for await (const p of req) parts.push(p)
    res.end(sum(Buffer.concat(parts)))
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  const answers = await Promise.all(Array.from({ length: 20 }, (_, i) => new Promise((resolve, reject) => {
    const body = data.subarray(i << 16, (i + 1) << 16)
    http.request({ port: server.address().port, host: '127.0.0.1', method: 'POST' }, async (res) => {
      let text = ''
      for await (const p of res) text += p
      resolve(text === sum(body))
    }).on('error', reject).end(body)
  })))
  server.close()
  console.log('answers', answers.filter(Boolean).length)

  const worker = new Worker('require("worker_threads").parentPort.once("message", (b) => { for (let i = 0; i < 1000; i++) Atomics.add(b, 0, i); process.exit() })', { eval: true })
  const shared = new Int32Array(new SharedArrayBuffer(4))
  worker.postMessage(shared)
  await new Promise((resolve) => worker.on('exit', resolve))
  console.log('thread', shared[0])
}

main().catch((err) => { console.error(err); process.exit(1) })
