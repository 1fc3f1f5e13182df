// Stores integers, one a line of stdin, exactly once, in a Ringo Exp server. Written from docs/protocol.md alone,
// for Node 18 or newer, without packages.
//
//   seq 1 100000 | node exactly_once.mjs [ws://localhost:6660/v1.0/ingest [SOURCE [FIRST]]]
//
// Prints "acked N" as acks come: the records before number N are stored. Ends with 0 when all are, with 1 when the server
// refuses for good. To go on after it was killed, give the same SOURCE, and the input from the record FIRST on.

import { createHash, randomBytes, randomUUID } from 'node:crypto';
import net from 'node:net';
import readline from 'node:readline';

const MOST_IN_MESSAGE = 1000, MOST_UNACKED = 20000; // records
const STALL = 90_000; // ms
const NEVER = [1002, 1003, 1007, 1008, 1009]; // close codes: the same again is of no use

const url = new URL(process.argv[2] ?? 'ws://localhost:6660/v1.0/ingest');
const source = process.argv[3] ?? randomUUID();
if (url.protocol !== 'ws:' || !/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(source)) {
  console.error('usage: exactly_once.mjs [ws://HOST:PORT/v1.0/ingest [UUID [FIRST]]]');
  process.exit(2);
}
let next = BigInt(process.argv[4] ?? 0); // the number of the next record
let acked = next; // everything before it is stored
let messages = []; // [first, count, payload], sent or not, the oldest that is not all acked in front
let unsent = 0; // so many of them, the newest, are not sent on this connection
let gathered = []; // integers that are no message yet
let base = next; // the number of this connection's first record
let socket = null, open = false, inputEnded = false, failures = 0, moved = Date.now();
let room = () => {};

function take(value) { // an integer of 64 bits
  if (!gathered.length) setImmediate(makeMessage); // what comes at once goes together
  gathered.push(value);
  if (gathered.length === MOST_IN_MESSAGE) makeMessage();
}

function makeMessage() {
  const count = gathered.length;
  if (!count) return;
  const payload = Buffer.alloc(4 + 28 + 8 * count);
  payload.writeUInt32BE(1, 0);
  payload.write(source.replaceAll('-', ''), 4, 'hex');
  payload.writeBigUInt64BE(next, 20);
  payload.writeUInt32BE(count, 28);
  gathered.forEach((value, i) => payload.writeBigInt64BE(value, 32 + 8 * i));
  if (!messages.length) moved = Date.now();
  messages.push([next, count, payload]);
  next += BigInt(count);
  unsent++;
  gathered = [];
  send();
}

function frame(opcode, payload) {
  const size = payload.length, mask = randomBytes(4);
  const head = Buffer.alloc(size < 126 ? 2 : size < 65536 ? 4 : 10);
  head[0] = 0x80 | opcode;
  head[1] = 0x80 | (size < 126 ? size : size < 65536 ? 126 : 127);
  if (head.length === 4) head.writeUInt16BE(size, 2);
  if (head.length === 10) head.writeBigUInt64BE(BigInt(size), 2);
  return Buffer.concat([head, mask, payload.map((byte, i) => byte ^ mask[i % 4])]);
}

function send() {
  while (open && unsent) socket.write(frame(2, messages[messages.length - unsent--][2]));
}

function connect() {
  const key = randomBytes(16).toString('base64');
  const accept = createHash('sha1').update(key + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest('base64');
  let data = Buffer.alloc(0), trouble = 'the connection was lost';
  const mine = socket = net.connect(url.port || 80, url.hostname);
  mine.setNoDelay(true);
  mine.on('connect', () => mine.write(
    `GET ${url.pathname} HTTP/1.1\r\nHost: ${url.host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n` +
    `Sec-WebSocket-Key: ${key}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: ringoexp.batch.v1\r\n\r\n`));
  mine.on('error', (error) => { trouble = error.message; });
  mine.on('data', (more) => {
    data = Buffer.concat([data, more]);
    if (!open) {
      const end = data.indexOf('\r\n\r\n');
      if (end < 0) return;
      const [first, ...lines] = data.subarray(0, end).toString('latin1').split('\r\n');
      const headers = Object.fromEntries(lines.map((line) => line.split(/:\s*/)).map(([n, v]) => [n.toLowerCase(), v]));
      const status = Number(first.split(' ')[1]);
      if (status >= 400 && status < 500 && status !== 408 && status !== 429) fail(`refused: ${first}`);
      if (status !== 101 || headers['sec-websocket-accept'] !== accept ||
          headers['sec-websocket-protocol'] !== 'ringoexp.batch.v1') return mine.destroy(new Error(first));
      data = data.subarray(end + 4);
      open = true;
      base = messages.length ? messages[0][0] : next;
      unsent = messages.length;
      moved = Date.now();
      send();
      finish();
    }
    while (data.length >= 2 && data.length >= 2 + data[1]) { // a server's frames have at most 125 bytes
      const opcode = data[0] & 15, payload = data.subarray(2, 2 + data[1]);
      data = data.subarray(2 + data[1]);
      if (opcode === 2) takeAck(base + payload.readBigUInt64BE());
      if (opcode === 9) mine.write(frame(10, payload));
      if (opcode === 8) {
        const code = payload.length ? payload.readUInt16BE() : 1005;
        trouble = `closed with ${code} ${payload.subarray(2)}`;
        if (NEVER.includes(code)) fail(trouble);
        mine.end(frame(8, payload.subarray(0, 2)));
      }
    }
  });
  mine.on('close', () => {
    open = false;
    if (inputEnded && acked === next) process.exit(0);
    console.error(trouble);
    setTimeout(connect, Math.random() * Math.min(5000, 100 * 2 ** failures++));
  });
}

function takeAck(count) {
  acked = count;
  failures = 0;
  moved = Date.now();
  while (messages.length && messages[0][0] + BigInt(messages[0][1]) <= acked) messages.shift();
  console.log(`acked ${acked}`);
  if (next - acked < MOST_UNACKED) room();
  finish();
}

function finish() {
  if (inputEnded && acked === next && open) socket.end(frame(8, Buffer.from([3, 232]))); // 1000
}

function fail(why) {
  console.error(`${why}; all before record ${acked} of source ${source} is stored`);
  process.exit(1);
}

setInterval(() => {
  if (messages.length && Date.now() - moved > STALL) socket.destroy(new Error('nothing was acked for 90 s'));
}, 1000);
connect();
for await (const line of readline.createInterface({ input: process.stdin })) {
  if (!/^\s*([+-]?\d+)?\s*$/.test(line)) {
    console.error(`no integer: ${line}`);
    process.exit(2);
  }
  if (line.trim()) take(BigInt(line.trim().replace(/^\+/, '')));
  if (next - acked >= MOST_UNACKED) await new Promise((resolve) => { room = resolve; });
}
makeMessage();
inputEnded = true;
finish();
